# SPDX-License-Identifier: Apache-2.0
"""Every setting of the core, defined once: name, default, range and description.

The settings are frozen dataclasses, grouped by pipeline step. Field names are unique over all
groups: ROS parameters and command-line options are generated from these fields, by their flat
names, and have no defaults of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar('T', bool, int, float, str)

PATCH_SIZE = 14  # pixels, of the patch encoder; image sides are multiples of it

# Shown wherever results of random weights are.
UNTRAINED_WARNING = 'the network is UNTRAINED: the pipeline runs, but its geometry is meaningless'


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

    :param low: smallest valid value, inclusive.
    :param high: largest valid value, inclusive.
    :param choices: the valid values of a text setting; empty: any text.
    """
    metadata = {'description': description, 'low': low, 'high': high, 'choices': choices}
    return field(default=default, metadata=metadata)


def check_range(group: object) -> None:
    """
    Check every field of a group of settings against its type, range and choices.

    :raises ValueError: naming the setting, its value and what was expected.
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
        # written so that NaN, which compares false with everything, is rejected
        if low is not None and not value >= low:
            raise ValueError(f'{entry.name} is {value}, expected at least {low}')
        if high is not None and not value <= high:
            raise ValueError(f'{entry.name} is {value}, expected at most {high}')
    if choices and value not in choices:
        raise ValueError(f'{entry.name} is {value!r}, expected one of {", ".join(choices)}')


@dataclass(frozen=True)
class ModelSettings:
    """Which network runs, on which device, and on images of which size."""

    checkpoint: str = setting(
        'embedded',
        "Weights of the network: 'embedded' (a small network that is part of the package, trained "
        "on synthetic rooms only), 'untrained' (random weights: the pipeline runs, the geometry "
        'is meaningless), a .safetensors or .pt file with the official key names, or a Hugging '
        "Face id such as 'facebook/VGGT-1B'. The size of the network is read from config.json "
        'beside the file; without one it is that of VGGT-1B.',
    )
    device: str = setting(
        'auto', "Torch device: 'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda:0', ..."
    )
    precision: str = setting(
        'auto',
        'Floating-point format of the aggregator. The heads always run in float32; on CUDA their '
        'convolutions run in TF32 unless this is float32. auto: bfloat16 on a CUDA device that '
        'supports it, float16 on an older one, float32 on the CPU.',
        choices=('auto', 'float32', 'bfloat16', 'float16'),
    )
    resolution: int = setting(
        0,
        "Width of the network's input images, pixels, a multiple of 14; the height follows from "
        'the aspect ratio. 0: the width that the network was trained on.',
        low=0,
        high=2058,
    )
    fit: str = setting(
        'crop',
        'How images are fitted to that width. crop: resized by its width; portrait images are '
        'then cropped to a square; pad: resized by its longer side and padded with white to a '
        'square; square: padded with black to a square, then resized.',
        choices=('crop', 'pad', 'square'),
    )
    compile: bool = setting(
        False,
        'Compile the network with torch.compile while the node is configured, which takes a '
        'minute or more and needs a C++ compiler. It is compiled for windows of window_size '
        'images of 4:3 (squares, with a fit other than crop), for others at their first window.',
    )
    max_device_memory: float = setting(
        0.0,
        'Device memory that the network may use, GB; 0: no limit. Windows are fitted to it while '
        'the node is configured: dense heads process fewer frames at once, then window_size is '
        'reduced, then resolution. Images of one camera, 4:3, are assumed.',
        low=0.0,
    )
    int8: str = setting(
        'off',
        'Linear layers of the encoder and the aggregator in 8-bit integers, by torchao (pip '
        'install torchao): less memory, less accurate. weights: weights are stored in 8 bits and '
        'computed with in the precision above; dynamic: activations are quantized too, per row.',
        choices=('off', 'weights', 'dynamic'),
    )
    frame_only_blocks: int = setting(
        0,
        'In so many of the first global attention blocks, attention is restricted to each frame: '
        'faster with many frames, less accurate. 0: none, as the network was trained.',
        low=0,
        high=1000,
    )
    fast_resize: bool = setting(
        False,
        'Resize images on the CPU by torch instead of Pillow: six times as fast on x86, but up to '
        '1 % of the values differ, by 1 or 2 of 255. On CUDA images are resized on the device, '
        'fast and exactly.',
    )

    def __post_init__(self) -> None:
        check_range(self)
        if self.resolution % PATCH_SIZE:
            raise ValueError(
                f'resolution is {self.resolution}, expected 0 or a multiple of {PATCH_SIZE}'
            )


@dataclass(frozen=True)
class CameraSettings:
    """How the calibration of a camera is used."""

    rectify: bool = setting(
        True,
        'Rectify images of a camera whose camera_info has distortion. false: the images are '
        'rectified already (image_rect), and described by P of camera_info.',
    )
    rectified_field_of_view: float = setting(
        0.0,
        'Horizontal field of view of rectified images, degrees. 0: the widest without empty '
        'borders; for a fisheye 100. Otherwise images without distortion are brought to it too.',
        low=0.0,
        high=150.0,
    )
    use_known_intrinsics: bool = setting(
        False,
        'Unproject depth with the calibrated intrinsics, if there are any, instead of the '
        'predicted ones; the published camera_info then has them too.',
    )
    average_intrinsics: bool = setting(
        True,
        'Average the predicted focal length over windows. false: for a camera that zooms.',
    )

    def __post_init__(self) -> None:
        check_range(self)


@dataclass(frozen=True)
class WindowSettings:
    """How frames become windows."""

    window_size: int = setting(
        8, 'Frames in one forward pass; memory and time grow with it.', low=2, high=512
    )
    window_stride: int = setting(
        4,
        'New frames between two windows. Smaller: poses come more often and windows overlap more; '
        'larger: less computation per frame. Must be smaller than window_size: windows are '
        'registered by the frames that they share.',
        low=1,
        high=511,
    )
    anchor_windows: int = setting(
        0,
        'Windows that share the same first frame, the anchor, instead of their oldest one, which '
        'limits drift. 0 or 1: none.',
        low=0,
        high=1000,
    )
    min_parallax: float = setting(
        0.01,
        'A frame is used if the median optical flow since the last used one is at least this '
        'share of the image width: a stationary camera adds no frames. 0: use every frame.',
        low=0.0,
        high=1.0,
    )
    max_stamp_gap: float = setting(
        5.0, 'A longer gap between two received images starts a new map, seconds.', low=0.001
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
    """How windows are registered to the map, and loops closed."""

    max_registration_residual: float = setting(
        0.5,
        'Maximal median distance of the points of shared frames between window and map, after '
        'registration, relative to their depth. A window above it starts a new map.',
        low=0.0,
    )
    registration_frames: int = setting(
        0,
        'Frames shared with the map whose depth is predicted again, to determine the scale of a '
        'window. More are more accurate and take longer. 0: two; one of two or three.',
        low=0,
        high=512,
    )
    loop_closure: bool = setting(
        False,
        'Recognise mapped places, verify them by a joint window and optimise the pose graph of '
        'all windows. Needs GTSAM (pip install gtsam), and the time of one more window for each '
        'candidate.',
    )
    loop_windows: int = setting(
        200,
        'Maximal number of windows stored for loop_closure; above it every second one is removed. '
        "Each stores images of half of its frames: at VGGT-1B's size 2.5 MB.",
        low=20,
        high=100000,
    )

    def __post_init__(self) -> None:
        check_range(self)

    def choose_shared(self, shared: Sequence[int]) -> list[int]:
        """
        Choose the frames shared with the map whose depth is predicted again, evenly spread.

        :param shared: indices of the shared frames in the window.
        """
        if not shared:
            return []
        count = min(self.registration_frames or min(2, max(1, len(shared) // 2)), len(shared))
        step = (len(shared) - 1) / max(count - 1, 1)
        return sorted({shared[round(i * step)] for i in range(count)})


@dataclass(frozen=True)
class ScaleSettings:
    """How the metric scale of the map is measured."""

    scale_source: str = setting(
        'none',
        'Metric scale source. none: lengths have the unknown scale of the network; fixed: '
        'scale_factor; tf: camera motion in odom_frame, from /tf; odometry: camera motion from '
        'the topic odometry; depth: depth images on the topic sensor_depth, registered to the '
        'camera.',
        choices=('none', 'fixed', 'tf', 'odometry', 'depth'),
    )
    scale_factor: float = setting(
        1.0,
        "Metres in one map unit, for scale_source 'fixed'.",
        low=1e-6,
        high=1e6,
    )
    min_scale: float = setting(
        0.001, 'Measured scales below this are rejected, metres in one map unit.', low=1e-9
    )
    max_scale: float = setting(
        1000.0, 'Measured scales above this are rejected, metres in one map unit.', low=1e-9
    )
    scale_windows: int = setting(
        50,
        'Number of windows whose scale measurements are kept; the scale is their median.',
        low=1,
        high=10000,
    )
    scale_min_travel: float = setting(
        0.05,
        'Minimal camera motion within a window from which scale is measured, metres.',
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
    """Which pixels are published."""

    min_confidence: float = setting(
        1.2,
        'Pixels with lower confidence are NaN in the depth image and absent from the cloud. The '
        'confidence of VGGT is at least 1; 0 accepts every pixel. Tune per scene.',
        low=0.0,
    )
    max_points: int = setting(
        50000, 'Maximal number of points of one cloud; it is subsampled evenly.', low=1
    )

    def __post_init__(self) -> None:
        check_range(self)


@dataclass(frozen=True)
class TrackSettings:
    """How many points are tracked."""

    track_points: int = setting(
        0,
        'Points that are tracked at a time, for ~/tracks; 0: none. They are tracked only while '
        'the topic has subscribers. Needs a network with a trained track head, which untrained '
        'and embedded do not have.',
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

        :raises ValueError: for an unknown name, or a value out of range.
        """
        groups = {}
        unknown = set(values)
        for group in fields(cls):
            group_type = _GROUPS[group.name]
            names = {entry.name for entry in fields(group_type)}
            groups[group.name] = group_type(**{n: values[n] for n in names & values.keys()})
            unknown -= names
        if unknown:
            raise ValueError(f'unknown settings: {", ".join(sorted(unknown))}')
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
    """Return the fields of every group, in reading order."""
    return [entry for group in _GROUPS.values() for entry in fields(group)]
