# SPDX-License-Identifier: Apache-2.0
"""Every setting of the core, once: name, default, range and description.

The settings are frozen dataclasses, grouped by the step that reads them. Field names are unique
over all groups, so that the node can offer them as flat ROS parameters and the command line as
flat flags; both are made from these fields and hold no default of their own.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar('T', bool, int, float, str)

PATCH_SIZE = 14  # image sides are multiples of it; fixed by the patch encoder of every VGGT


def setting(
    default: T,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """
    Declare one setting: a dataclass field with a range and a description.

    :param low: smallest legal value, inclusive.
    :param high: largest legal value, inclusive.
    :param choices: the legal values of a text setting; empty: any text.
    """
    metadata = {'description': description, 'low': low, 'high': high, 'choices': choices}
    return field(default=default, metadata=metadata)


def check_range(group: object) -> None:
    """
    Check every field of a group of settings against its type, range and choices.

    :raises ValueError: with the setting's name, the value found and what was expected.
    """
    for entry in fields(group):  # type: ignore[arg-type]
        _check_value(entry, getattr(group, entry.name))


def _check_value(entry: Field[Any], value: object) -> None:
    expected = type(entry.default)
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(
            f'{entry.name} is {value!r} ({type(value).__name__}), expected {expected.__name__}'
        )
    low, high = entry.metadata['low'], entry.metadata['high']
    choices = entry.metadata['choices']
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # written so that a NaN, which compares false with everything, is refused
        if low is not None and not value >= low:
            raise ValueError(f'{entry.name} is {value}, expected at least {low}')
        if high is not None and not value <= high:
            raise ValueError(f'{entry.name} is {value}, expected at most {high}')
    if choices and value not in choices:
        raise ValueError(f'{entry.name} is {value!r}, expected one of {", ".join(choices)}')


@dataclass(frozen=True)
class ModelSettings:
    """Which network runs, where, and on images of which size."""

    checkpoint: str = setting(
        'embedded',
        "Weights of the network: 'embedded' (a small network that comes with the package, trained "
        "on synthetic rooms only), 'untrained' (one with random weights: the pipeline runs, its "
        'geometry means nothing), a .safetensors or .pt file with the official '
        "key names, or a Hugging Face id such as 'facebook/VGGT-1B'. A config.json beside the "
        'file gives the size of the network; without one it is that of VGGT-1B.',
    )
    device: str = setting(
        'auto', "Torch device: 'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda:0', ..."
    )
    precision: str = setting(
        'auto',
        'Number format of the aggregator; the heads always run in float32, their convolutions on '
        'CUDA in TF32 unless this is float32. auto: bfloat16 on a CUDA device that computes it, '
        'float16 on an older one, float32 on the CPU.',
        choices=('auto', 'float32', 'bfloat16', 'float16'),
    )
    resolution: int = setting(
        0,
        'Width of the image that the network sees, pixels, a multiple of 14; the height follows '
        'from the aspect ratio. 0: the width that the network was trained for.',
        low=0,
        high=2058,
    )
    fit: str = setting(
        'crop',
        'How an image is brought to that width. crop: by its width, then rows beyond a square are '
        'cut off above and below (they only exist in upright images); pad: by its longer side, '
        'white bars make it square; square: black bars make it square.',
        choices=('crop', 'pad', 'square'),
    )
    compile: bool = setting(
        False,
        'torch.compile makes kernels of its own for this network, while the node is configured: '
        'that takes a minute or more and needs a C++ compiler. They are made for windows of '
        'window_size images of 4:3 (of squares, with another fit than crop); other images are '
        'compiled for at their first window.',
    )
    max_device_memory: float = setting(
        0.0,
        'Memory of the device that the network may take, GB; 0: all that is there. Windows are '
        'fitted to it while the node is configured: dense heads take fewer frames at once, then '
        'window_size becomes smaller, then resolution. Images of one camera, 4:3, are expected.',
        low=0.0,
    )
    int8: str = setting(
        'off',
        'Linear layers of the encoder and the aggregator in 8-bit integers, by torchao (pip '
        "install 'vggt_ros[int8]'): less memory, less exact (docs/speed.md). weights: they are "
        'kept so and computed with in the precision; dynamic: inputs are rounded too, row by row.',
        choices=('off', 'weights', 'dynamic'),
    )
    frame_only_blocks: int = setting(
        0,
        'In so many of the first rounds, global attention looks within each frame only: faster '
        'with many frames, less exact (docs/speed.md). 0: none, as the network was trained.',
        low=0,
        high=1000,
    )
    fast_resize: bool = setting(
        False,
        'Resize images on the CPU by torch instead of Pillow: in a sixth of the time on x86, but '
        'up to 1 % of the values differ, by 1 or 2 of 255 (docs/speed.md). On CUDA they are '
        'resized there, fast and exactly.',
    )

    def __post_init__(self) -> None:
        check_range(self)
        if self.resolution % PATCH_SIZE:
            raise ValueError(
                f'resolution is {self.resolution}, expected 0 or a multiple of {PATCH_SIZE}'
            )


@dataclass(frozen=True)
class CameraSettings:
    """What a calibration is used for."""

    rectify: bool = setting(
        True,
        'Images of a camera whose camera_info has distortion are rectified for the network. '
        'false: the images are rectified already (image_rect), camera_info describes them by P.',
    )
    rectified_field_of_view: float = setting(
        0.0,
        'Horizontal field of view of rectified images, degrees. 0: the widest that leaves no edge '
        'empty; of a fisheye 100. Other than 0: images without distortion are brought to it too.',
        low=0.0,
        high=150.0,
    )
    use_known_intrinsics: bool = setting(
        False,
        'Points and the published camera_info come from the calibration, if there is one, instead '
        'of the focal length that the network predicts.',
    )
    average_intrinsics: bool = setting(
        True,
        'The predicted focal length is averaged over windows. false: for a camera that zooms.',
    )

    def __post_init__(self) -> None:
        check_range(self)


@dataclass(frozen=True)
class WindowSettings:
    """How frames are gathered into windows."""

    window_size: int = setting(
        8, 'Frames that the network sees together; memory and time grow with it.', low=2, high=512
    )
    window_stride: int = setting(
        4,
        'New frames between two windows. Smaller: poses come more often and windows overlap more; '
        'larger: less work per frame. Must be smaller than window_size: windows are joined by '
        'the frames that they share.',
        low=1,
        high=511,
    )
    anchor_windows: int = setting(
        0,
        'Windows that keep the same first frame, the anchor, in the place of their oldest one: '
        'the map drifts less, as each of them is held by it. 0 or 1: none.',
        low=0,
        high=1000,
    )
    min_parallax: float = setting(
        0.01,
        'A frame is taken when the median optical flow since the last one taken is at least this '
        'share of the image width; a standing camera then adds no copies. 0: take every frame.',
        low=0.0,
        high=1.0,
    )
    max_stamp_gap: float = setting(
        5.0, 'A longer silence between two received images starts a new map, seconds.', low=0.001
    )

    def __post_init__(self) -> None:
        check_range(self)
        if self.window_stride >= self.window_size:
            raise ValueError(
                f'window_stride is {self.window_stride}, expected less than window_size, '
                f'which is {self.window_size}'
            )


@dataclass(frozen=True)
class RegistrationSettings:
    """When two windows are believed to show the same scene, and where earlier ones are sought."""

    max_registration_residual: float = setting(
        0.5,
        'A window is registered to the map only if the points of the shared frames lie no farther '
        "from the map's than this, after registration, as a median share of their depth; if not, "
        'a new map starts.',
        low=0.0,
    )
    registration_frames: int = setting(
        0,
        'Frames shared with the map whose depth is computed again, to find how long the unit of a '
        'window is. More are more exact and take longer. 0: two, but one of two or three.',
        low=0,
        high=512,
    )
    loop_closure: bool = setting(
        False,
        'Earlier windows that look like the newest are tried together with it; where both show '
        'the same place, all windows of the map are moved to fit. Needs GTSAM (pip install '
        'gtsam), and the time of one more window for each attempt.',
    )
    loop_windows: int = setting(
        200,
        'Windows that are remembered for loop_closure at most; then every second one is '
        "forgotten. Each takes images of half of its frames: at VGGT-1B's size 2.5 MB.",
        low=20,
        high=100000,
    )

    def __post_init__(self) -> None:
        check_range(self)

    def shared_depth_frames(self, shared: int) -> int:
        """Say of how many of the shared frames depth is computed again."""
        return min(self.registration_frames or min(2, max(1, shared // 2)), shared)


@dataclass(frozen=True)
class ScaleSettings:
    """What makes the map's unit a metre."""

    scale_source: str = setting(
        'none',
        'What tells how long a metre is. none: nothing, lengths are in a unit of the network; '
        "fixed: scale_factor; tf: the camera's way in odom_frame, by /tf; odometry: the "
        "camera's way by the topic odometry; depth: images of a depth sensor on the topic "
        'sensor_depth, registered to the camera.',
        choices=('none', 'fixed', 'tf', 'odometry', 'depth'),
    )
    scale_factor: float = setting(
        1.0,
        "Metres in one unit of the network, for scale_source 'fixed'.",
        low=1e-6,
        high=1e6,
    )
    min_scale: float = setting(
        0.001, 'Measured scales below this are refused, metres in one unit.', low=1e-9
    )
    max_scale: float = setting(
        1000.0, 'Measured scales above this are refused, metres in one unit.', low=1e-9
    )
    scale_windows: int = setting(
        50,
        'Windows whose measurements are kept; the scale is their median.',
        low=1,
        high=10000,
    )
    scale_min_travel: float = setting(
        0.05,
        'The way of the camera tells the scale where it is at least this long within a window, '
        'metres.',
        low=0.0,
    )

    def __post_init__(self) -> None:
        check_range(self)
        if self.min_scale >= self.max_scale:
            raise ValueError(
                f'min_scale is {self.min_scale}, expected less than max_scale, which is '
                f'{self.max_scale}'
            )


@dataclass(frozen=True)
class CloudSettings:
    """Which pixels are believed and published."""

    min_confidence: float = setting(
        1.2,
        'Pixels whose confidence is lower are NaN in the depth image and absent from the cloud. '
        "VGGT's confidence begins at 1; 0 accepts every pixel.",
        low=0.0,
    )
    max_points: int = setting(
        50000, 'Points of one cloud message at most; the cloud is subsampled evenly.', low=1
    )

    def __post_init__(self) -> None:
        check_range(self)


@dataclass(frozen=True)
class TrackSettings:
    """Which points of the image are followed."""

    track_points: int = setting(
        0,
        'Points that are followed through the windows at a time, for ~/tracks; 0: none. They are '
        'followed only while somebody subscribes. It needs a network whose track head was '
        'trained, which those of untrained and embedded are not.',
        low=0,
        high=2048,
    )

    def __post_init__(self) -> None:
        check_range(self)


@dataclass(frozen=True)
class Settings:
    """All settings of the core."""

    model: ModelSettings = field(default_factory=ModelSettings)
    camera: CameraSettings = field(default_factory=CameraSettings)
    window: WindowSettings = field(default_factory=WindowSettings)
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    cloud: CloudSettings = field(default_factory=CloudSettings)
    tracks: TrackSettings = field(default_factory=TrackSettings)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Settings:
        """
        Build the groups from flat names.

        :raises ValueError: for a name that no setting has, or a value out of range.
        """
        groups = {}
        unknown = set(values)
        for group in fields(cls):
            group_type = _GROUPS[group.name]
            names = {entry.name for entry in fields(group_type)}
            groups[group.name] = group_type(**{n: values[n] for n in names & values.keys()})
            unknown -= names
        if unknown:
            raise ValueError(f'no setting is called {", ".join(sorted(unknown))}')
        return cls(**groups)


_GROUPS: dict[str, Any] = {
    'model': ModelSettings,
    'camera': CameraSettings,
    'window': WindowSettings,
    'registration': RegistrationSettings,
    'scale': ScaleSettings,
    'cloud': CloudSettings,
    'tracks': TrackSettings,
}


def all_settings() -> list[Field[Any]]:
    """List the fields of every group, in the order in which a person should read them."""
    return [entry for group in _GROUPS.values() for entry in fields(group)]
