# SPDX-License-Identifier: Apache-2.0
"""
Updates of the map become messages: pure functions, no node, no publisher.

Big arrays go through `array.array('B')` and `frombytes`: assigning a numpy array to a message
field costs about 300 times more. Poses are camera-to-world, quaternions in the order x, y, z, w.
"""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Pose, Quaternion
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
from std_msgs.msg import Header

from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.mapping.map_update import MapUpdate, PointCloud
from vggt_ros.mapping.point_tracker import PointTracks
from vggt_ros.msg import Tracks, WindowReport

_SECOND_NS = 1_000_000_000
_UNKNOWN = -1.0  # in covariance[0]: nothing is known of the accuracy, as sensor_msgs/Imu has it

_POINT = np.dtype(
    [
        ('x', '<f4'),
        ('y', '<f4'),
        ('z', '<f4'),
        ('rgb', '<u4'),  # 0x00RRGGBB, declared as a float32 as RViz and PCL expect
        ('confidence', '<f4'),
    ]
)
_POINT_FIELDS = [
    PointField(name=name, offset=offset, datatype=PointField.FLOAT32, count=1)
    for name, (_, offset) in ((name, _POINT.fields[name][:2]) for name in _POINT.names or ())
]


def time_from_ns(stamp_ns: int) -> Time:
    """Split nanoseconds; the second is rounded down, so that nanosec is never negative."""
    seconds, nanoseconds = divmod(stamp_ns, _SECOND_NS)
    return Time(sec=seconds, nanosec=nanoseconds)


def make_header(frame_id: str, stamp_ns: int) -> Header:
    """Make a header with an acquisition stamp."""
    return Header(frame_id=frame_id, stamp=time_from_ns(stamp_ns))


def make_poses(world_from_camera: npt.NDArray[np.float64]) -> list[Pose]:
    """
    Turn cameras into poses.

    :param world_from_camera: (S, 4, 4), rigid.
    """
    quaternions = quaternion_from_matrix(torch.from_numpy(world_from_camera[:, :3, :3]))
    return [
        Pose(
            position=Point(x=float(t[0]), y=float(t[1]), z=float(t[2])),
            orientation=Quaternion(x=q[0], y=q[1], z=q[2], w=q[3]),
        )
        for t, q in zip(world_from_camera[:, :3, 3], quaternions.tolist())
    ]


def make_odometry(
    header: Header,
    child_frame: str,
    pose: Pose,
    covariance: npt.NDArray[np.float64] | None,
) -> Odometry:
    """
    Make the odometry of one camera; its speed is not measured.

    :param covariance: (6, 6), x, y, z and the rotations about the fixed axes; None: unknown.
    """
    message = Odometry(header=header, child_frame_id=child_frame)
    message.pose.pose = pose
    if covariance is None:
        message.pose.covariance[0] = _UNKNOWN
    else:
        message.pose.covariance = covariance.ravel()
    message.twist.covariance[0] = _UNKNOWN
    return message


def make_float_image(header: Header, values: npt.NDArray[np.float32]) -> Image:
    """Turn (H, W) floats into a 32FC1 image."""
    height, width = values.shape
    return Image(
        header=header,
        height=height,
        width=width,
        encoding='32FC1',
        is_bigendian=0,
        step=4 * width,
        data=_bytes_of(values.astype('<f4', copy=False)),
    )


def make_camera_info(
    header: Header, intrinsics: npt.NDArray[np.float64], height: int, width: int
) -> CameraInfo:
    """Describe a pinhole camera without distortion, for an image of this size."""
    return CameraInfo(
        header=header,
        height=height,
        width=width,
        distortion_model='plumb_bob',
        d=[0.0] * 5,
        k=intrinsics.ravel(),
        r=np.eye(3).ravel(),
        p=np.hstack([intrinsics, np.zeros((3, 1))]).ravel(),
    )


def make_cloud_message(header: Header, cloud: PointCloud) -> PointCloud2:
    """Turn N coloured points into a cloud with the fields x, y, z, rgb, confidence."""
    points = np.empty(len(cloud.xyz), _POINT)
    points['x'], points['y'], points['z'] = cloud.xyz.T
    red, green, blue = cloud.rgb.astype(np.uint32).T
    points['rgb'] = red << 16 | green << 8 | blue
    points['confidence'] = cloud.confidence
    return PointCloud2(
        header=header,
        height=1,
        width=len(points),
        fields=_POINT_FIELDS,
        is_bigendian=False,
        point_step=_POINT.itemsize,
        row_step=points.nbytes,
        data=_bytes_of(points),
        is_dense=True,
    )


def make_window_report(
    update: MapUpdate, world_frame: str, poses: list[Pose], total_seconds: float
) -> WindowReport:
    """Say everything about one window; see msg/WindowReport.msg."""
    frames = update.batch.frames
    geometry, registration = update.reconstruction, update.registration
    height, width = geometry.image_size
    starts = bool(update.map_start_reason)  # then there is nothing to be aligned with
    return WindowReport(
        header=make_header(world_frame, frames[-1].stamp_ns),
        window_id=update.window_id,
        map_id=update.map_id,
        map_start_reason=update.map_start_reason,
        stamps=[time_from_ns(frame.stamp_ns) for frame in frames],
        frame_ids=list(update.batch.ids),
        is_new=list(update.is_new),
        camera_frames=[frame.camera_frame for frame in frames],
        poses=poses,
        confidence=update.confidence.tolist(),
        intrinsics=geometry.intrinsics.ravel().tolist(),
        width=width,
        height=height,
        scale=float(update.world_from_window.scale),
        scale_source=update.metric.source,
        scale_valid=update.metric.valid,
        scale_spread=float(update.metric.spread),
        scale_age=float(update.metric.age),
        aligned=starts or registration.accepted,
        rejection_reason='' if starts else registration.rejection_reason,
        registration_residual=0.0 if starts else float(registration.residual),
        registration_inliers=1.0 if starts else float(registration.inliers),
        overlap=registration.shared,
        loop_closed=update.loop_closure is not None,
        loop_window_id=0 if update.loop_closure is None else update.loop_closure.with_window,
        frames_dropped=update.dropped,
        model=update.model,
        model_trained=update.model_trained,
        preprocess_seconds=update.seconds['preprocess'],
        inference_seconds=update.seconds['inference'],
        reconstruct_seconds=update.seconds['reconstruct'],
        registration_seconds=update.seconds['register'],
        total_seconds=total_seconds,
    )


def make_tracks(update: MapUpdate, tracks: PointTracks) -> Tracks:
    """Say where the points that are followed are in each frame; see msg/Tracks.msg."""
    frames = update.batch.frames
    return Tracks(
        header=make_header(frames[-1].camera_frame, frames[-1].stamp_ns),
        window_id=update.window_id,
        map_id=update.map_id,
        stamps=[time_from_ns(frame.stamp_ns) for frame in frames],
        frame_ids=list(update.batch.ids),
        camera_frames=[frame.camera_frame for frame in frames],
        ids=array.array('Q', tracks.ids.astype(np.uint64).tobytes()),
        pixels=_floats_of(tracks.pixels),
        visibility=_floats_of(tracks.visibility),
        confidence=_floats_of(tracks.confidence),
        trained=tracks.trained,
    )


def _floats_of(values: npt.NDArray[np.float32]) -> array.array[float]:
    data = array.array('f')
    data.frombytes(memoryview(np.ascontiguousarray(values)).cast('B'))
    return data


def _bytes_of(values: npt.NDArray[Any]) -> array.array[int]:
    data = array.array('B')
    data.frombytes(memoryview(np.ascontiguousarray(values)).cast('B'))
    return data
