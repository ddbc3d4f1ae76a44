# SPDX-License-Identifier: Apache-2.0
"""Training windows from recordings with ground truth: TUM RGB-D, 7-Scenes, bags."""

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
from vggt_ros.lab.training.dataset import TrainingBatch, make_training_batch

# Ends of the splits, in the order of `SPLITS`, as shares of a recording: validation and test
# frames were recorded after all training frames.
_ENDS = (0.8, 0.9, 1.0)
_OCCLUSION_TOLERANCE = 0.05  # relative depth: noise and rounding to a pixel stay below it


@dataclass(frozen=True)
class RecordedDataset:
    """
    Windows of neighbouring frames, forward or backward in time, with random steps.

    :raises ValueError: if a recording's split is shorter than a window, or the recordings' images
        differ in height at the same width.
    """

    recordings: Sequence[RgbdRecording]
    split: str  # 'train', 'validation' or 'test'
    seed: int
    width: int  # pixels, a multiple of the patch size; the height follows from the images
    max_frames: int = 2  # of a window
    queries: int = 0  # points to track
    max_step: int = 10  # frames of the recording between two of a window
    device: torch.device | str = 'cpu'

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f'split is {self.split!r}; expected one of {SPLITS}')
        if not self.recordings:
            raise ValueError('there are no recordings; expected at least one')
        heights = []
        for recording in self.recordings:
            count = len(split_frames(len(recording), self.split))
            if count < self.max_frames:
                raise ValueError(
                    f'{recording.name} has {count} frames for {self.split}; expected at least '
                    f'the {self.max_frames} of a window'
                )
            first = recording.frame(0)
            if np.isnan(first.depth).all():
                raise ValueError(f'{recording.name} has no depth; expected a recording with it')
            image = fit_image(first.image, self.width, 'crop')
            heights.append((recording.name, image.pixels.shape[0]))
        if len({height for _, height in heights}) > 1:
            raise ValueError(
                f'images {self.width} pixels wide would have different heights, {heights}; '
                'expected recordings of one aspect ratio'
            )

    def batch(self, first: int, count: int, frames: int) -> TrainingBatch:
        """
        Read windows; see `Dataset`.

        :raises ValueError: if `frames` exceeds `max_frames`, or a recording cannot be read.
        """
        if frames > self.max_frames:
            raise ValueError(f'{frames} frames in a window; expected at most {self.max_frames}')
        windows = [self._window(index, frames) for index in range(first, first + count)]
        images, poses, intrinsics, depth, queries = (
            torch.stack(part).to(self.device) for part in zip(*windows, strict=True)
        )
        tracks, visible = _track(poses, intrinsics, depth, queries)
        return make_training_batch(images, poses, intrinsics, depth, tracks, visible)

    def _window(self, index: int, frames: int) -> tuple[Tensor, ...]:
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index, frames])
        ranges = [split_frames(len(recording), self.split) for recording in self.recordings]
        lengths = np.array([len(each) for each in ranges])
        chosen = int(random.choice(len(ranges), p=lengths / lengths.sum()))
        available, recording = ranges[chosen], self.recordings[chosen]
        max_step = min(self.max_step, (len(available) - 1) // max(frames - 1, 1))
        steps = random.integers(1, max_step, size=frames - 1, endpoint=True)
        start = int(random.integers(len(available) - steps.sum()))
        indices = available.start + start + np.cumsum([0, *steps])
        if random.random() < 0.5:
            indices = indices[::-1]
        images, poses, intrinsics, depths = [], [], [], []
        for frame_index in indices:
            frame = recording.frame(int(frame_index))
            image = fit_image(frame.image, self.width, 'crop')
            images.append(image.pixels)
            poses.append(frame.world_from_camera)
            intrinsics.append(np.linalg.inv(image.source_from_network) @ frame.intrinsics)
            depths.append(_sample_depth(frame, image))
        known = np.argwhere(depths[0] > 0)[:, ::-1]  # x, y
        if not len(known):
            known = np.zeros((1, 2), known.dtype)  # nothing to track; never visible
        queries = known[random.integers(len(known), size=self.queries)]
        from_first = np.linalg.inv(poses[0]) @ np.stack(poses)  # exact far from the origin
        return (
            stack_images(images),
            *(
                torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
                for part in (from_first, np.stack(intrinsics), np.stack(depths), queries)
            ),
        )


def split_frames(count: int, split: str) -> range:
    """Return the frames of a recording that belong to a split."""
    number = SPLITS.index(split)
    begin = _ENDS[number - 1] if number else 0.0
    return range(round(begin * count), round(_ENDS[number] * count))


def _sample_depth(frame: RgbdFrame, image: PreprocessedImage) -> npt.NDArray[np.float32]:
    """Return depth (H, W) at the pixels of the network's image; 0: unknown."""
    rows, columns = np.indices(image.pixels.shape[:2])
    depth = sample_source(frame.depth, frame.image.shape, image.source_from_network, rows, columns)
    return np.where(np.isfinite(depth), depth, np.float32(0))


def _track(
    world_from_camera: Tensor, intrinsics: Tensor, depth: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Project points of the first frame into all frames by their depth.

    :param depth: (B, S, H, W), 0 where unknown.
    :param queries: (B, K, 2), x, y, whole pixels of the first frame.
    :returns: pixels (B, S, K, 2) and visibility (B, S, K): the depth measured there agrees.
    """
    frames, height, width = depth.shape[1:]
    x, y = queries.long().unbind(-1)
    points = unproject(depth[:, 0], intrinsics[:, 0]).flatten(1, 2)
    points = points.gather(1, (y * width + x)[..., None].expand(-1, -1, 3))
    points = transform_points(world_from_camera[:, 0], points)
    camera_from_world = invert_rigid(world_from_camera)[..., :3, :]
    tracks, in_camera = project(
        points[:, None].expand(-1, frames, -1, -1), camera_from_world, intrinsics
    )
    limit = tracks.new_tensor([width - 1, height - 1])
    inside = ((tracks >= 0) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
    columns, rows = torch.where(inside[..., None], tracks, 0.0).round().long().unbind(-1)
    measured = depth.flatten(2).gather(2, rows * width + columns)
    difference = (in_camera[..., 2] / measured.clamp(min=1e-6) - 1).abs()
    tracks = torch.where(in_camera[..., 2:] > 0, tracks, 0.0)
    return tracks, inside & (difference < _OCCLUSION_TOLERANCE) & (measured > 0)
