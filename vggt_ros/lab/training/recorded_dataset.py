# SPDX-License-Identifier: Apache-2.0
"""Training windows from recordings with truth: TUM RGB-D, 7-Scenes, bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.frames.batch import PreprocessedImage, sample_source, stack_images
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.geometry.camera import invert_rigid, project, transform_points, unproject
from vggt_ros.io.rgbd import RgbdFrame, RgbdRecording
from vggt_ros.lab.synthetic.windows import SPLITS
from vggt_ros.lab.training.samples import Sample, make_sample

# Shares of a recording's time that the splits get, in the order of `SPLITS`: what is validated on
# was recorded after what is trained on.
_ENDS = (0.8, 0.9, 1.0)
_SAME_DEPTH = 0.05  # relative difference that noise and rounding to a pixel may make


@dataclass(frozen=True)
class RecordedSource:
    """
    Windows of neighbouring frames, forward or backward in time, with gaps of random length.

    :raises ValueError: if a recording's split is too short for a window, or the recordings'
        pictures differ in height at the same width.
    """

    recordings: Sequence[RgbdRecording]
    split: str  # 'train', 'validation' or 'test'
    seed: int
    width: int  # pixels, a multiple of the patch size; the height follows from the pictures
    most_frames: int = 2  # that a window will have
    queries: int = 0  # points to track
    longest_step: int = 10  # frames of the recording between two of a window
    device: torch.device | str = 'cpu'

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f'split is {self.split!r}; expected one of {SPLITS}')
        if not self.recordings:
            raise ValueError('there are no recordings; expected at least one')
        heights = []
        for recording in self.recordings:
            there = len(split_frames(len(recording), self.split))
            if there < self.most_frames:
                raise ValueError(
                    f'{recording.name} has {there} frames for {self.split}; expected at least '
                    f'the {self.most_frames} of a window'
                )
            first = recording.frame(0)
            if np.isnan(first.depth).all():
                raise ValueError(f'{recording.name} has no depth; expected a recording with it')
            image = fit_image(first.image, self.width, 'crop')
            heights.append((recording.name, image.pixels.shape[0]))
        if len({height for _, height in heights}) > 1:
            raise ValueError(
                f'pictures {self.width} pixels wide would have different heights, {heights}; '
                'expected recordings of one shape'
            )

    def windows(self, first: int, count: int, frames: int) -> Sample:
        """
        Read windows; see `Source`.

        :raises ValueError: if these are too long windows, or a recording cannot be read.
        """
        if frames > self.most_frames:
            raise ValueError(f'{frames} frames in a window; expected at most {self.most_frames}')
        read = [self._window(place, frames) for place in range(first, first + count)]
        images, poses, intrinsics, depth, queries = (
            torch.stack(part).to(self.device) for part in zip(*read, strict=True)
        )
        tracks, visible = _track(poses, intrinsics, depth, queries)
        return make_sample(images, poses, intrinsics, depth, tracks, visible)

    def _window(self, place: int, frames: int) -> tuple[Tensor, ...]:
        draws = np.random.default_rng([self.seed, SPLITS.index(self.split), place, frames])
        parts = [split_frames(len(recording), self.split) for recording in self.recordings]
        lengths = np.array([len(part) for part in parts])
        chosen = int(draws.choice(len(parts), p=lengths / lengths.sum()))
        part, recording = parts[chosen], self.recordings[chosen]
        longest = min(self.longest_step, (len(part) - 1) // max(frames - 1, 1))
        steps = draws.integers(1, longest, size=frames - 1, endpoint=True)
        begin = int(draws.integers(len(part) - steps.sum()))
        places = part.start + begin + np.cumsum([0, *steps])
        if draws.random() < 0.5:
            places = places[::-1]
        images, poses, intrinsics, depths = [], [], [], []
        for index in places:
            frame = recording.frame(int(index))
            image = fit_image(frame.image, self.width, 'crop')
            images.append(image.pixels)
            poses.append(frame.world_from_camera)
            intrinsics.append(np.linalg.inv(image.source_from_network) @ frame.intrinsics)
            depths.append(_look_up(frame, image))
        known = np.argwhere(depths[0] > 0)[:, ::-1]  # x, y
        if not len(known):
            known = np.zeros((1, 2), known.dtype)  # nothing to track; it counts as never seen
        queries = known[draws.integers(len(known), size=self.queries)]
        from_first = np.linalg.inv(poses[0]) @ np.stack(poses)  # exact, however far the origin is
        return (
            stack_images(images),
            *(
                torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
                for part in (from_first, np.stack(intrinsics), np.stack(depths), queries)
            ),
        )


def split_frames(count: int, split: str) -> range:
    """Say which of a recording's frames belong to a split."""
    number = SPLITS.index(split)
    begin = _ENDS[number - 1] if number else 0.0
    return range(round(begin * count), round(_ENDS[number] * count))


def _look_up(frame: RgbdFrame, image: PreprocessedImage) -> npt.NDArray[np.float32]:
    """Return depth (H, W) at the pixels of the network's image; 0: unknown."""
    rows, columns = np.indices(image.pixels.shape[:2])
    found = sample_source(frame.depth, frame.image.shape, image.source_from_network, rows, columns)
    return np.where(np.isfinite(found), found, np.float32(0))


def _track(
    world_from_camera: Tensor, intrinsics: Tensor, depth: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Follow points of the first frame by their depth.

    :param depth: (B, S, H, W), 0 where unknown.
    :param queries: (B, K, 2), x, y, whole pixels of the first frame.
    :returns: pixels (B, S, K, 2), and whether the depth measured there says the same.
    """
    frames, height, width = depth.shape[1:]
    x, y = queries.long().unbind(-1)
    points = unproject(depth[:, 0], intrinsics[:, 0]).flatten(1, 2)
    chosen = points.gather(1, (y * width + x)[..., None].expand(-1, -1, 3))
    world = transform_points(world_from_camera[:, 0], chosen)
    camera_from_world = invert_rigid(world_from_camera)[..., :3, :]
    tracks, in_camera = project(
        world[:, None].expand(-1, frames, -1, -1), camera_from_world, intrinsics
    )
    limit = tracks.new_tensor([width - 1, height - 1])
    inside = ((tracks >= 0) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
    columns, rows = torch.where(inside[..., None], tracks, 0.0).round().long().unbind(-1)
    measured = depth.flatten(2).gather(2, rows * width + columns)
    near = (in_camera[..., 2] / measured.clamp(min=1e-6) - 1).abs() < _SAME_DEPTH
    tracks = torch.where(in_camera[..., 2:] > 0, tracks, 0.0)
    return tracks, inside & near & (measured > 0)
