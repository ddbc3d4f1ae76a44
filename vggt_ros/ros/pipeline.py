# SPDX-License-Identifier: Apache-2.0
"""
What runs while the node is active: intake, worker, publishers of the window, timer and service.

Made by *activate*, ended by *deactivate*; the network, the engine and the map's publishers outlive
it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from std_srvs.srv import Trigger

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.synchronizer import Synchronizer
from vggt_ros.inference.network import Network
from vggt_ros.io.message_reading import ImageError
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.ros.diagnostics import Diagnostics
from vggt_ros.ros.intake import ImageIntake
from vggt_ros.ros.log import RateLimitedLog
from vggt_ros.ros.map_to_odom import MapToOdom
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import MapPublishers
from vggt_ros.ros.robot_frames import RobotFrames
from vggt_ros.ros.scale_inputs import ScaleInputs
from vggt_ros.ros.transforms import CameraTransforms
from vggt_ros.ros.worker import InferenceWorker, ReceivedFrameSet, ReceivedImage

_COUNTED_BEFORE = ('received', 'dropped')  # the engine counts again what is counted here


class Pipeline:
    """From the image topic to the published map."""

    def __init__(
        self,
        node: Any,
        settings: NodeSettings,
        window_stride: int,
        network: Network,
        engine: StreamingEngine,
        publishers: MapPublishers,
        robot_frames: RobotFrames,
        scale_inputs: ScaleInputs,
        map_to_odom: MapToOdom | None,
        counts: Counter[str],
    ) -> None:
        """
        Subscribe and start the worker.

        :param counts: goes on counting; each key is written by one thread.
        """
        self._node = node
        self._engine = engine
        self._publishers = publishers
        self._counts = counts
        self._log = RateLimitedLog(node.get_logger())
        self._diagnostics = Diagnostics(node, network)
        self._transforms = CameraTransforms(node, settings, self._log)
        self._robot_frames = robot_frames
        self._map_to_odom = map_to_odom
        if map_to_odom is not None:
            map_to_odom.start(node, self._complain_counted)
        if map_to_odom is not None or scale_inputs.asks_frames:
            robot_frames.start(node)
        self._worker = InferenceWorker(
            engine,
            self._decode,
            self._publish,
            window_stride,
            counts,
            self._complain,
            publishers.wants_tracks,
        )
        self._worker.start()
        self._scale_inputs = scale_inputs
        scale_inputs.start(node, self._complain_counted)
        self._synchroniser = self._make_synchroniser(settings)
        self._intakes = [
            ImageIntake(node, settings, self._offer, counts, self._complain, camera)
            for camera in range(len(settings.camera_topics))
        ]
        self._timer = node.create_timer(settings.diagnostics_period, self._report)
        self._reset = node.create_service(Trigger, '~/reset', self._answer_reset)

    def stop(self) -> None:
        """End everything, after the window that is being computed."""
        for intake in self._intakes:
            intake.destroy()
        self._scale_inputs.stop()
        self._robot_frames.stop()
        self._node.destroy_timer(self._timer)
        self._node.destroy_service(self._reset)
        self._worker.stop()
        self._transforms.destroy()
        if self._map_to_odom is not None:
            self._map_to_odom.stop()
        self._diagnostics.destroy()

    def stop_computing(self, timeout: float) -> bool:
        """
        End the worker alone, for a process that ends.

        :param timeout: seconds that it gets for the window that it computes.
        :returns: False if it still computes; it publishes nothing more.
        """
        return self._worker.stop(timeout)

    def _make_synchroniser(self, settings: NodeSettings) -> Synchronizer[ReceivedImage]:
        topics = [images for images, _ in settings.camera_topics]

        def report_silent(camera: int, seconds: float) -> None:
            self._complain_counted(
                'silent_camera',
                f"no image on '{topics[camera]}' for {seconds:.1f} s: the other cameras go on",
            )

        def report_unmatched(camera: int) -> None:
            self._complain_counted(
                'unmatched_image',
                f"an image on '{topics[camera]}' is left out: no other camera has one within "
                f'{settings.sync_slop} s of it (sync_slop)',
            )

        return Synchronizer(
            len(topics),
            settings.sync_slop,
            settings.camera_timeout,
            report_silent,
            report_unmatched,
        )

    def _offer(self, image: ReceivedImage) -> None:
        for moment in self._synchroniser.add(image.camera, image):
            self._worker.offer(ReceivedFrameSet(tuple(moment.values())))

    def _decode(self, moment: ReceivedFrameSet) -> list[Frame]:
        """
        Decode what can be decoded.

        :raises ImageError: if that is nothing.
        """
        frames, bad = [], []
        for image in moment.images:
            try:
                frames.append(self._intakes[image.camera].decode(image))
            except ImageError as error:
                bad.append(error)
        told = 0 if frames else 1  # the worker tells what is raised
        for error in bad[told:]:
            self._counts[f'bad_image_{error.cause}'] += 1
            self._complain(f'bad_image_{error.cause}', f'an image is left out: {error}')
        if not frames:
            raise bad[0]
        return frames

    def _publish(self, update: MapUpdate, newest: ReceivedFrameSet) -> None:
        poses = self._publishers.publish(update, newest.arrived)
        self._transforms.publish(update.batch.frames, poses)
        if self._map_to_odom is not None:
            self._map_to_odom.update(update, newest.arrived)
        self._diagnostics.record_output(update, newest.arrived)

    def _complain(self, kind: str, sentence: str) -> None:
        self._diagnostics.record_error(sentence)
        self._log.warn(kind, sentence)

    def _complain_counted(self, kind: str, sentence: str) -> None:
        self._counts[kind] += 1
        self._log.warn(kind, sentence)

    def _report(self) -> None:
        counts = Counter(self._worker.engine_counts)
        for key in _COUNTED_BEFORE:
            del counts[key]
        counts.update(self._counts.copy(), waiting=self._worker.waiting)
        publishers = max(intake.count_publishers() for intake in self._intakes)
        if publishers > 1:
            self._log.warn(
                'several_publishers',
                f'{publishers} publishers of images, expected one camera: their images are mixed',
            )
        self._diagnostics.publish(counts, publishers, self._engine.window_size)

    def _answer_reset(self, _request: Any, response: Any) -> Any:
        self._worker.reset('reset was called')
        response.success = True
        response.message = 'a new map starts with the next image'
        return response
