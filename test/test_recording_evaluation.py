# SPDX-License-Identifier: Apache-2.0
"""A recording is mapped and compared with its ground truth."""

import math

import cv2
import numpy as np
import pytest
import torch
from evo.core import sync
from evo.core.metrics import APE, RPE, PoseRelation, StatisticsType, Unit
from evo.tools import file_interface

from vggt_ros.geometry.camera import encode_pose, invert_rigid
from vggt_ros.geometry.rotation import matrix_from_quaternion, nearest_rotation
from vggt_ros.io.rgbd import RgbdFrame
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.lab.evaluation.recording import (
    compare_clouds,
    evaluate_recording,
    recording_table,
)
from vggt_ros.lab.evaluation.trajectory_errors import compare_trajectories, relative_pose_errors
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

FRAMES, HEIGHT, WIDTH = 14, 42, 56
MATRIX = torch.tensor([[45.0, 0, 28], [0, 45, 21], [0, 0, 1]])
SETTINGS = Settings.from_flat({'window_size': 6, 'window_stride': 4, 'min_parallax': 0.0})


class RoomRecording:
    """Rendered images of a room, as a recording."""

    name = 'room'

    def __init__(self, frames=FRAMES):
        self.poses = smooth_trajectory(frames, seed=3)
        matrices = MATRIX.expand(frames, 3, 3)
        self.images, self.depth = render(
            SyntheticScene.room(5), self.poses, matrices, HEIGHT, WIDTH
        )

    def __len__(self):
        return len(self.poses)

    def frame(self, index):
        return RgbdFrame(
            stamp=5 + index / 10,
            image=self.images[index].numpy(),
            depth=self.depth[index].numpy(),
            world_from_camera=self.poses[index].double().numpy(),
            intrinsics=MATRIX.double().numpy(),
        )


class ExactNetwork:
    """The recording's ground truth in a scale that grows with each window."""

    name, trained, device, precision, image_width = 'exact', True, 'cpu', 'float32', WIDTH
    tracks_trained = False

    def __init__(self, recording, growth=0.0):
        self.recording, self.growth = recording, growth

    def prepare(self, settings):
        return settings

    def __call__(self, batch, heads):  # noqa: ARG002 - the protocol of a network
        dense = [round((batch.frames[i].stamp_ns * 1e-9 - 5) * 10) for i in batch.depth_indices]
        indices = [round((frame.stamp_ns * 1e-9 - 5) * 10) for frame in batch.frames]
        scale = 0.5 * (1 + self.growth * batch.window_id)
        poses = self.recording.poses[indices].double()
        poses = torch.linalg.inv(poses[0]) @ poses
        poses[:, :3, 3] *= scale
        matrices = MATRIX.double().expand(len(indices), 3, 3)
        encodings = encode_pose(invert_rigid(poses), matrices, HEIGHT, WIDTH)
        return Prediction(
            pose_encodings=[encodings[None]],
            depth=scale * self.recording.depth[dense][None],
            depth_confidence=torch.full((1, len(dense), HEIGHT, WIDTH), 2.0),
        )


@pytest.fixture(scope='module')
def recording():
    return RoomRecording()


def test_an_exact_network_has_no_errors(recording):
    evaluation = evaluate_recording(ExactNetwork(recording, growth=0.1), recording, SETTINGS)
    metrics = evaluation.metrics
    assert (metrics['maps'], metrics['frames']) == (1, FRAMES)
    assert metrics['ate_percent'] < 0.01 and metrics['rotation_deg'] < 0.05
    assert metrics['rpe_m'] < 1e-4 and metrics['rpe_deg'] < 0.05
    # Neighbouring samples of the same surface are this far apart.
    assert metrics['cloud_accuracy_m'] < 0.03 and metrics['cloud_completeness_m'] < 0.03
    assert metrics['absrel'] < 1e-3 and metrics['delta1'] == 1
    assert metrics['scale_drift_percent'] < 0.1  # the registration compensates the growth


def test_clouds_are_compared_in_both_directions():
    truth = np.array([[0.0, 0, 0], [1, 0, 0]])
    assert compare_clouds(truth, np.array([[0.0, 0.1, 0]])) == pytest.approx(
        (0.1, (0.1 + math.hypot(1, 0.1)) / 2)
    )


def test_step_and_number_of_frames_are_respected(recording):
    evaluation = evaluate_recording(ExactNetwork(recording), recording, SETTINGS, step=2, frames=6)
    assert evaluation.stamps == pytest.approx(5 + 0.2 * np.arange(6))


def test_a_recording_shorter_than_a_window_is_rejected(recording):
    with pytest.raises(ValueError, match='room: there is no map'):
        evaluate_recording(ExactNetwork(recording), recording, SETTINGS, frames=3)


def test_saved_trajectories_are_read_by_others(recording, tmp_path):
    evaluation = evaluate_recording(ExactNetwork(recording), recording, SETTINGS)
    assert 'ate_percent' in recording_table(evaluation)
    evaluation.save(tmp_path)
    assert cv2.imread(str(tmp_path / 'path.png')).shape[1] == 1500
    truth = file_interface.read_tum_trajectory_file(tmp_path / 'truth.tum')
    assert truth.timestamps == pytest.approx(5 + np.arange(FRAMES) / 10)
    assert np.allclose(truth.poses_se3, recording.poses, atol=1e-6)
    estimate = file_interface.read_tum_trajectory_file(tmp_path / 'estimate.tum')
    assert estimate.timestamps == pytest.approx(truth.timestamps)


def test_errors_equal_those_of_evo(tmp_path):
    random = np.random.default_rng(0)
    truth = smooth_trajectory(50, seed=1).double().numpy()
    # from single precision
    truth[:, :3, :3] = nearest_rotation(torch.from_numpy(truth[:, :3, :3])).numpy()
    estimate = truth.copy()
    quaternions = np.concatenate([0.05 * random.normal(size=(50, 3)), np.ones((50, 1))], axis=1)
    estimate[:, :3, :3] @= matrix_from_quaternion(torch.from_numpy(quaternions)).numpy()
    estimate[:, :3, 3] = 3 * estimate[:, :3, 3] + random.normal(scale=0.05, size=(50, 3))
    for name, poses in (('truth', truth), ('estimate', estimate)):
        write_trajectory(tmp_path / name, list(np.arange(50.0)), poses)
    pair = sync.associate_trajectories(
        *(file_interface.read_tum_trajectory_file(tmp_path / n) for n in ('truth', 'estimate'))
    )
    pair[1].align(pair[0], correct_scale=True)
    absolute = APE(PoseRelation.translation_part)
    absolute.process_data(pair)
    errors = compare_trajectories(truth, estimate)
    rms = absolute.get_statistic(StatisticsType.rmse)
    assert errors.position_rms == pytest.approx(rms, abs=1e-9)
    aligned = errors.truth_from_estimate.transform_poses(estimate)
    translations, rotations = relative_pose_errors(truth, aligned)
    for ours, relation in (
        (translations, PoseRelation.translation_part),
        (rotations, PoseRelation.rotation_angle_rad),
    ):
        relative = RPE(relation, delta=1, delta_unit=Unit.frames)
        relative.process_data(pair)
        np.testing.assert_allclose(ours, relative.error, rtol=0, atol=1e-9)
