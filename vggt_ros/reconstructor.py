# SPDX-License-Identifier: Apache-2.0
"""
The Python API: `Reconstructor`.

    from vggt_ros import Reconstructor

    scene = Reconstructor('facebook/VGGT-1B').run('drive.mcap')
    scene.trajectory, scene.point_cloud, scene.frames[0].depth
    scene.save('drive_map')

    for update in Reconstructor().stream(frames):
        print(update.map_id, update.world_from_camera)

`run` is what the command `vggt reconstruct` does, `stream` what the node does with its frames.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.inference.load import EMBEDDED, load_network
from vggt_ros.io.array_frames import ArrayFrames, Image, frames_from_images
from vggt_ros.io.frame_source import IMAGE_RATE, FrameSource
from vggt_ros.io.recordings import open_frames
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.model.embedded import find_embedded
from vggt_ros.offline.export import ExportOptions
from vggt_ros.offline.reconstruct import ReconstructOptions, reconstruct_recording
from vggt_ros.offline.run import RunOptions
from vggt_ros.offline.scene import Scene, TemporaryFolder
from vggt_ros.settings import Settings

logger = logging.getLogger(__name__)


class Reconstructor:
    """Reconstructs recordings and image streams with one network, which is loaded once."""

    def __init__(self, checkpoint: str = EMBEDDED, **settings: bool | int | float | str) -> None:
        """
        Load the network.

        :param checkpoint: 'embedded' (a small network that is part of the package, trained on
            synthetic rooms only), 'untrained', a .safetensors or .pt file, or a Hugging Face id
            such as 'facebook/VGGT-1B'.
        :param settings: any others, as in `config/vggt.yaml`: `window_size=16`, `device='cpu'`.
        :raises ValueError: for an unknown setting or a value out of range.
        :raises CheckpointError: if the weights cannot be loaded.
        """
        self.settings = Settings.from_flat({'checkpoint': checkpoint, **settings})
        self._network = load_network(self.settings.model)

    def run(
        self,
        recording: str | os.PathLike[str] | Iterable[Image | Frame],
        *,
        topic: str = '',
        odom_frame: str = 'odom',
        rate: float = IMAGE_RATE,
        stamps_ns: Sequence[int] | None = None,
        calibration: Calibration | None = None,
        every: int = 1,
        all_at_once: bool = False,
        refine: bool = False,
    ) -> Scene:
        """
        Reconstruct a recording.

        :param recording: a bag, a video, a folder of images or a pattern such as 'shots/*.jpg';
            or images (H, W, 3), RGB, uint8, in time order.
        :param topic: image topic of a bag with several.
        :param odom_frame: fixed frame of the camera motion on /tf of a bag, for the scale source
            'tf'.
        :param rate: images per second, of images without stamps.
        :param stamps_ns: acquisition times of images in memory.
        :param calibration: of the camera, for images in memory.
        :param every: every n-th image is used.
        :param all_at_once: one window of all images.
        :param refine: bundle adjustment over tracks of the network's track head.
        :returns: the largest map, the same as of the command.
        :raises ValueError: if the recording cannot be read or is too short, or the settings need
            what it does not have.
        :raises OSError: if the temporary folder is full.
        """
        source = _open(recording, topic, odom_frame, rate, stamps_ns, calibration)
        if every < 1:
            raise ValueError(f'every is {every}, expected at least 1')
        options = ReconstructOptions(
            RunOptions(every=every, all_at_once=all_at_once, tracks=refine),
            ExportOptions(refine=refine),
        )
        temporary = TemporaryFolder(Path(tempfile.mkdtemp(prefix='vggt_ros_')))
        try:
            result = reconstruct_recording(
                source,
                self._network,
                self.settings,
                options,
                temporary.path / 'scene',
                lambda _: None,
                lambda: False,
            )
        except BaseException:
            temporary.close()
            raise
        assert result.export is not None  # it was not stopped
        return Scene(result.export, result.folder, temporary, self._warning())

    def stream(
        self,
        frames: Iterable[Image | Frame],
        *,
        rate: float = IMAGE_RATE,
        calibration: Calibration | None = None,
    ) -> Iterator[MapUpdate]:
        """
        Reconstruct a live stream of one camera; each call starts a new map.

        :param frames: images (H, W, 3), RGB, uint8, in time order, or frames with their stamps.
        :param rate: images per second, of images without stamps.
        :param calibration: of the camera, for images.
        :returns: an update for each window as soon as it is complete, and one for the last,
            incomplete window. A window whose prediction is no valid geometry is dropped with a
            warning in the log.
        :raises ValueError: for an image of another shape or type; or if the settings need
            messages for the metric scale.
        """
        if isinstance(frames, (str, os.PathLike)):
            raise ValueError(f'frames is {frames!r}, expected images; run() reads recordings')
        engine = StreamingEngine(self.settings, self._network)
        return _updates(engine, frames_from_images(frames, rate, None, calibration))

    def _warning(self) -> str:
        if self.settings.model.checkpoint != EMBEDDED:
            return ''
        trained_on = find_embedded()[1].trained_on
        return f'the embedded network was trained on {trained_on}: expect poor geometry elsewhere'


def _open(
    recording: str | os.PathLike[str] | Iterable[Image | Frame],
    topic: str,
    odom_frame: str,
    rate: float,
    stamps_ns: Sequence[int] | None,
    calibration: Calibration | None,
) -> FrameSource:
    if not isinstance(recording, (str, os.PathLike)):
        return ArrayFrames(recording, rate, stamps_ns, calibration)
    if stamps_ns is not None or calibration is not None:
        raise ValueError('stamps_ns and calibration are for images in memory')
    if not rate > 0:
        raise ValueError(f'rate is {rate}, expected more than 0')
    return open_frames(os.fspath(recording), topic, rate, odom_frame)


def _updates(engine: StreamingEngine, frames: Iterator[Frame]) -> Iterator[MapUpdate]:
    updates = 0
    for frame in frames:
        try:
            update = engine.add(frame)
        except PredictionError as error:
            logger.warning('window dropped: %s', error)
            continue
        if update is not None:
            updates += 1
            yield update
    try:
        update = engine.finish()
    except PredictionError as error:
        logger.warning('last window dropped: %s', error)
        return
    if update is not None:
        yield update
    elif not updates:
        logger.warning('no window from %d images', engine.counts.get('received', 0))
