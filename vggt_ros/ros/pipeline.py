# SPDX-License-Identifier: Apache-2.0
"""
What runs while the node is active: subscriptions, worker, publication, diagnostics, reset.

Made by *activate* and stopped by *deactivate*; the `Runtime` outlives it.
"""

from __future__ import annotations

from std_srvs.srv import Trigger

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.synchronizer import Synchronizer
from vggt_ros.io import names
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.ros.diagnostics import Diagnostics
from vggt_ros.ros.intake import ImageIntake
from vggt_ros.ros.runtime import Runtime
from vggt_ros.ros.transforms import CameraTransforms
from vggt_ros.ros.worker import InferenceWorker, ReceivedFrameSet, ReceivedImage


class Pipeline:
    """From the image topics to the published map."""

    def __init__(self, runtime: Runtime) -> None:
        """Subscribe and start the worker."""
        self._runtime = runtime
        node, settings, engine = runtime.node, runtime.settings, runtime.engine
        self._diagnostics = Diagnostics(node, runtime.network, runtime.faults)
        self._transforms = CameraTransforms(node, settings, runtime.faults)
        if runtime.map_to_odom is not None:
            runtime.map_to_odom.start()
        if runtime.map_to_odom is not None or runtime.scale_inputs.needs_frames:
            runtime.robot_frames.start()
        self._worker = InferenceWorker(
            engine,
            self._decode,
            self._publish,
            runtime.publishers.has_track_subscribers,
            engine.window_stride,
            runtime.counts,
            runtime.faults,
        )
        self._worker.start()
        runtime.scale_inputs.start()
        cameras = range(len(settings.camera_topics))
        self._synchronizer: Synchronizer[ReceivedImage] = Synchronizer(
            len(cameras),
            settings.sync_slop,
            settings.camera_timeout,
            self._report_silent,
            self._report_unmatched,
        )
        self._intakes = [ImageIntake(runtime, camera, self._push) for camera in cameras]
        self._image_publishers = 1
        self._timer = node.create_timer(settings.diagnostics_period, self._publish_diagnostics)
        self._reset_service = node.create_service(Trigger, names.RESET, self._reset)

    def stop(self) -> None:
        """Stop everything, after the window that is being computed."""
        runtime, node = self._runtime, self._runtime.node
        for intake in self._intakes:
            intake.destroy()
        runtime.scale_inputs.stop()
        runtime.robot_frames.stop()
        node.destroy_timer(self._timer)
        node.destroy_service(self._reset_service)
        self._worker.stop()
        self._transforms.destroy()
        if runtime.map_to_odom is not None:
            runtime.map_to_odom.stop()
        self._diagnostics.destroy()

    def stop_worker(self, timeout: float) -> bool:
        """
        Stop the worker alone, when the process ends.

        :param timeout: seconds to wait for the window that is being computed.
        :returns: False if it still computes; it publishes nothing more.
        """
        return self._worker.stop(timeout)

    def _push(self, image: ReceivedImage) -> None:
        for images in self._synchronizer.add(image.camera, image):
            self._worker.push(ReceivedFrameSet(tuple(images.values())))

    def _decode(self, image: ReceivedImage) -> Frame:
        return self._intakes[image.camera].decode(image)

    def _publish(self, update: MapUpdate, newest: ReceivedFrameSet) -> None:
        poses = self._runtime.publishers.publish(update, newest.arrived)
        self._transforms.publish(update.batch.frames, poses)
        if self._runtime.map_to_odom is not None:
            self._runtime.map_to_odom.update(update, newest.arrived)
        self._diagnostics.record_output(update, newest.arrived)

    def _report_silent(self, camera: int, seconds: float) -> None:
        topic, _ = self._runtime.settings.camera_topics[camera]
        self._runtime.faults.report(
            'silent_camera',
            f"no image on '{topic}' for {seconds:.1f} s: mapping continues with the other cameras",
        )

    def _report_unmatched(self, camera: int) -> None:
        topic, _ = self._runtime.settings.camera_topics[camera]
        self._runtime.faults.report(
            'unmatched_image',
            f"image on '{topic}' dropped: no other camera has one within "
            f'{self._runtime.settings.sync_slop} s of it (sync_slop)',
        )

    def _publish_diagnostics(self) -> None:
        publishers = max(intake.count_publishers() for intake in self._intakes)
        if publishers > max(self._image_publishers, 1):
            self._runtime.node.get_logger().warning(
                f'{publishers} publishers on the image topic, expected one: their images are mixed'
            )
        self._image_publishers = publishers
        # The engine's statistics also serve callers without a worker: of images received and
        # dropped and of windows rejected, the counts of the node are published.
        counts = {
            **self._worker.engine_counts,
            **self._runtime.counts.copy(),
            **self._runtime.faults.counts,
            'waiting': self._worker.waiting,
        }
        self._diagnostics.publish(counts, publishers, self._runtime.engine.window_size)

    def _reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._worker.reset('reset was called')
        response.success = True
        response.message = 'a new map starts with the next image'
        return response
