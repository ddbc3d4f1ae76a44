# SPDX-License-Identifier: Apache-2.0
"""The configuration of a VGGT network, as frozen dataclasses.

Field names and nesting are those of the `config.json` beside checkpoints and golden data. The
defaults are VGGT-1B. Does not import torch. Invalid sizes raise a ValueError with the value and
what was expected.

Source: VGGT (arXiv 2503.11651), section 3 and appendix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

# Metadata in a description that is not part of the configuration.
IGNORED_FIELDS = frozenset({'name', '_case'})


@dataclass(frozen=True)
class ViTConfig:
    """The per-frame encoder (a DINOv2-style ViT with registers)."""

    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4


@dataclass(frozen=True)
class AggregatorConfig:
    """Alternating attention; a layer is a frame attention block and a global attention block."""

    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4
    num_register_tokens: int = 4
    rope_freq: float = 100


@dataclass(frozen=True)
class CameraConfig:
    """The camera head: a small trunk that runs several iterations on the same tokens."""

    trunk_depth: int = 4
    num_heads: int = 16
    mlp_ratio: float = 4
    num_iterations: int = 4


@dataclass(frozen=True)
class DPTConfig:
    """The depth and point heads; all DPT heads read the layers `intermediate_layer_idx`."""

    features: int = 256
    out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    intermediate_layer_idx: tuple[int, ...] = (4, 11, 17, 23)


@dataclass(frozen=True)
class TrackConfig:
    """The track head: a DPT feature extractor and an iterative point tracker.

    `pos_embed` enables the positional embedding of the feature extractor: off in VGGT-1B, on in
    the `VGGT_tracker_fixed` checkpoint, which has the same keys.
    """

    features: int = 128
    out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    pos_embed: bool = False
    iters: int = 4
    stride: int = 2
    corr_levels: int = 7
    corr_radius: int = 4
    hidden_size: int = 384
    depth: int = 6
    num_heads: int = 8
    num_virtual_tracks: int = 64
    max_scale: float = 518

    @property
    def min_image_size(self) -> int:
        """Smallest side, in pixels, for which the coarsest correlation level has a pixel."""
        return self.stride << (self.corr_levels - 1)


@dataclass(frozen=True)
class VGGTConfig:
    """The sizes of one network.

    :raises ValueError: if a size is of the wrong type or the sizes are inconsistent.
    """

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    vit: ViTConfig = field(default_factory=ViTConfig)
    agg: AggregatorConfig = field(default_factory=AggregatorConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    dpt: DPTConfig = field(default_factory=DPTConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        for prefix, group in (('', self), *self._groups()):
            _check_numbers(prefix, group)
        _divides(self.img_size, 'patch_size', self.patch_size, 'img_size')
        _divides(self.embed_dim, 'vit.num_heads', self.vit.num_heads, 'embed_dim')
        _divides(self.embed_dim, 'agg.num_heads', self.agg.num_heads, 'embed_dim')
        _divides(2 * self.embed_dim, 'camera.num_heads', self.camera.num_heads, '2 * embed_dim')
        _divides(
            self.track.hidden_size, 'track.num_heads', self.track.num_heads, 'track.hidden_size'
        )
        head_dim = self.embed_dim // self.agg.num_heads
        if head_dim % 4:
            raise ValueError(
                f'embed_dim / agg.num_heads is {head_dim}; 2-D RoPE needs a multiple of 4'
            )
        self._check_dpt_heads()

    def _check_dpt_heads(self) -> None:
        layers = self.dpt.intermediate_layer_idx
        if len(layers) != 4 or list(layers) != sorted(layers):
            raise ValueError(
                f'dpt.intermediate_layer_idx is {layers}; expected 4 layer indices in order'
            )
        if layers[-1] >= self.agg.depth:
            raise ValueError(
                f'dpt.intermediate_layer_idx is {layers}; expected 0 to {self.agg.depth - 1}, '
                f'since agg.depth is {self.agg.depth}'
            )
        for name, channels in (
            ('dpt', self.dpt.out_channels),
            ('track', self.track.out_channels),
        ):
            if len(channels) != 4 or any(c % 4 for c in channels):
                raise ValueError(
                    f'{name}.out_channels is {channels}; expected 4 multiples of 4 '
                    '(sine and cosine in two axes)'
                )
        if self.dpt.features % 8:
            raise ValueError(f'dpt.features is {self.dpt.features}; expected a multiple of 8')
        if self.track.features % 4:
            raise ValueError(f'track.features is {self.track.features}; expected a multiple of 4')

    def _groups(self) -> tuple[tuple[str, Any], ...]:
        return tuple(
            (f'{item.name}.', getattr(self, item.name))
            for item in dataclasses.fields(self)
            if dataclasses.is_dataclass(getattr(self, item.name))
        )

    @classmethod
    def vggt_1b(cls) -> VGGTConfig:
        """The published size: 1 256 537 516 parameters."""
        return cls()

    @classmethod
    def small(cls) -> VGGTConfig:
        """About 3 million parameters, for two CPU cores and images 112 pixels wide."""
        return cls(
            img_size=112,
            embed_dim=96,
            vit=ViTConfig(depth=4, num_heads=3),
            agg=AggregatorConfig(depth=4, num_heads=3),
            camera=CameraConfig(trunk_depth=2, num_heads=6, mlp_ratio=2),
            dpt=DPTConfig(
                features=32, out_channels=(24, 48, 64, 64), intermediate_layer_idx=(0, 1, 2, 3)
            ),
            track=TrackConfig(
                features=32,
                out_channels=(16, 24, 32, 32),
                corr_levels=5,
                corr_radius=3,
                hidden_size=64,
                depth=2,
                num_heads=4,
                num_virtual_tracks=16,
            ),
        )

    @classmethod
    def tiny(cls) -> VGGTConfig:
        """The smallest network with every part; for tests only."""
        return cls(
            img_size=56,
            embed_dim=32,
            vit=ViTConfig(depth=1, num_heads=2),
            agg=AggregatorConfig(depth=2, num_heads=2),
            camera=CameraConfig(trunk_depth=1, num_heads=2, mlp_ratio=2),
            dpt=DPTConfig(
                features=16, out_channels=(8, 8, 12, 16), intermediate_layer_idx=(0, 0, 1, 1)
            ),
            track=TrackConfig(
                features=16,
                out_channels=(8, 8, 12, 16),
                corr_levels=3,
                corr_radius=2,
                hidden_size=32,
                depth=1,
                num_heads=4,
                num_virtual_tracks=4,
            ),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VGGTConfig:
        """Create a configuration from parsed JSON; missing sizes are those of VGGT-1B.

        :raises ValueError: on an unknown field, a value of the wrong type or inconsistent sizes.
        """
        known = {key: value for key, value in fields.items() if key not in IGNORED_FIELDS}
        for name, group in _GROUPS.items():
            if name in known:
                known[name] = _read_group(name, group, known[name])
        return cast(VGGTConfig, _read_group('VGGTConfig', cls, known))

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries; `from_dict` reads them back, also through JSON."""
        return dataclasses.asdict(self)


_GROUPS: dict[str, type[Any]] = {
    'vit': ViTConfig,
    'agg': AggregatorConfig,
    'camera': CameraConfig,
    'dpt': DPTConfig,
    'track': TrackConfig,
}


def _read_group(name: str, group: type[Any], fields: object) -> Any:
    if not isinstance(fields, Mapping):
        raise ValueError(f'{name} is {fields!r}; expected a mapping of sizes')
    expected = [item.name for item in dataclasses.fields(group)]
    unknown = sorted(str(key) for key in fields if key not in expected)
    if unknown:
        raise ValueError(
            f'{name} has unknown fields {", ".join(unknown)}; expected {", ".join(expected)}'
        )
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return group(**values)


def _check_numbers(prefix: str, group: Any) -> None:
    """Check that each value has the type of its default and that numbers are positive."""
    defaults = type(group)() if prefix else None
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        default = getattr(defaults, item.name) if defaults is not None else item.default
        if not isinstance(default, (bool, int, float, tuple)):
            kind = _GROUPS[item.name]
            if not isinstance(value, kind):
                raise ValueError(f'{item.name} is {value!r}; expected {kind.__name__}')
            continue
        name = f'{prefix}{item.name}'
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f'{name} is {value!r}; expected true or false')
        elif isinstance(default, tuple):
            lowest = 0 if item.name == 'intermediate_layer_idx' else 1
            if not isinstance(value, tuple) or not all(_is_int(v) and v >= lowest for v in value):
                raise ValueError(f'{name} is {value!r}; expected a list of integers >= {lowest}')
        elif item.type == 'int':
            lowest = 0 if item.name in ('num_register_tokens', 'corr_radius') else 1
            if not _is_int(value) or value < lowest:
                raise ValueError(f'{name} is {value!r}; expected an integer >= {lowest}')
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f'{name} is {value!r}; expected a number > 0')


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _divides(whole: int, part_name: str, part: int, whole_name: str) -> None:
    if whole % part:
        raise ValueError(f'{part_name} is {part}; expected a divisor of {whole_name}, {whole}')
