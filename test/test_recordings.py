# SPDX-License-Identifier: Apache-2.0
"""Recordings with ground truth: a known scene written in each format is read back."""

import json
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from fake_network import FakeNetwork
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vggt_ros.cli.evaluate import Evaluate
from vggt_ros.cli.train import Train
from vggt_ros.engine import StreamingEngine
from vggt_ros.geometry.camera import invert_rigid, project, transform_points
from vggt_ros.geometry.poses import interpolate_poses
from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.inference.load import load_network
from vggt_ros.io.bag_recording import BagRecording
from vggt_ros.io.recordings import open_frames, open_recording
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.lab.training.recipes import RECIPES
from vggt_ros.lab.training.recorded_dataset import RecordedDataset, split_frames
from vggt_ros.settings import ModelSettings, Settings

FRAMES, HEIGHT, WIDTH = 10, 48, 64
START = 1_700_000_000.0  # s
PERIOD = 1 / 30
TYPES = get_typestore(Stores.ROS2_JAZZY)


@pytest.fixture(scope='module')
def scene():
    """Ten views of a room: images, depth (m), camera-to-world poses and intrinsics."""
    poses = smooth_trajectory(FRAMES, seed=3)
    focal = WIDTH * 525 / 640  # as the recordings' cameras
    matrix = torch.tensor(
        [[focal, 0, 319.5 * WIDTH / 640], [0, focal, 239.5 * WIDTH / 640], [0, 0, 1]]
    )
    images, depth = render(
        SyntheticScene.room(5), poses, matrix.expand(FRAMES, 3, 3), height=HEIGHT, width=WIDTH
    )
    return SimpleNamespace(
        images=images.numpy(), depth=depth.numpy(), poses=poses.double().numpy(), matrix=matrix
    )


def pose_values(pose):
    return [*pose[:3, 3], *quaternion_from_matrix(torch.from_numpy(pose[:3, :3])).numpy()]


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def write_tum(folder, scene):
    for number in range(FRAMES):
        write_image(folder / f'rgb/{number}.png', scene.images[number][..., ::-1])
        units = np.round(scene.depth[number] * 5000).astype(np.uint16)
        units[0, 0] = 0
        write_image(folder / f'depth/{number}.png', units)
    stamps = START + PERIOD * np.arange(FRAMES)
    lists = {
        'rgb.txt': [f'{stamp:.6f} rgb/{i}.png' for i, stamp in enumerate(stamps)],
        'depth.txt': [f'{stamp + 0.004:.6f} depth/{i}.png' for i, stamp in enumerate(stamps)],
        'groundtruth.txt': [
            f'{stamp:.6f} ' + ' '.join(f'{value:.9f}' for value in pose_values(pose))
            for stamp, pose in zip(stamps, scene.poses)
        ],
    }
    for name, lines in lists.items():
        (folder / name).write_text('\n'.join(['# a comment', *lines]) + '\n')
    return folder


def write_seven_scenes(folder, scene):
    for number in range(FRAMES):
        stem = f'frame-{number:06}'
        write_image(folder / f'{stem}.color.png', scene.images[number][..., ::-1])
        units = np.round(scene.depth[number] * 1000).astype(np.uint16)
        units[0, 0] = 65535
        write_image(folder / f'{stem}.depth.png', units)
        np.savetxt(folder / f'{stem}.pose.txt', scene.poses[number])
    return folder


def write_euroc(folder, scene):
    """Write a grey camera with extrinsics; the ground truth is that of the body."""
    body_from_camera = np.eye(4)
    body_from_camera[:3] = [[0, 0, 1, 0.1], [-1, 0, 0, 0.2], [0, -1, 0, 0.3]]
    camera = folder / 'mav0/cam0'
    stamps = [round(1e9 * (START + PERIOD * number)) for number in range(FRAMES)]
    for number, stamp in enumerate(stamps):
        grey = cv2.cvtColor(scene.images[number], cv2.COLOR_RGB2GRAY)
        write_image(camera / f'data/{stamp}.png', grey)
    images = [f'{stamp},{stamp}.png' for stamp in stamps]
    (camera / 'data.csv').write_text('\n'.join(['#timestamp [ns],filename', *images]) + '\n')
    fx, fy, cx, cy = (float(scene.matrix[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    (camera / 'sensor.yaml').write_text(
        'sensor_type: camera\n'
        'T_BS:\n  cols: 4\n  rows: 4\n'
        f'  data: {body_from_camera.ravel().tolist()}\n'
        f'resolution: [{WIDTH}, {HEIGHT}]\n'
        f'intrinsics: [{fx}, {fy}, {cx}, {cy}]\n'
        'distortion_model: radial-tangential\n'
        'distortion_coefficients: [-0.28, 0.07, 0.0002, 0.00002]\n'
    )
    rows = ['#timestamp, p_RS_R_x [m], ..., q_RS_w [], q_RS_x [], ...']
    for stamp, pose in zip(stamps, scene.poses):
        x, y, z, qx, qy, qz, qw = pose_values(pose @ np.linalg.inv(body_from_camera))
        rows.append(','.join(map(repr, map(float, (x, y, z, qw, qx, qy, qz, 0, 0, 0)))))
        rows[-1] = f'{stamp},{rows[-1]}'
    truth = folder / 'mav0/state_groundtruth_estimate0/data.csv'
    truth.parent.mkdir(parents=True)
    truth.write_text('\n'.join(rows) + '\n')
    return folder


class BagWriter:
    """Writes messages by the names of their types."""

    def __init__(self, path, storage):
        self.writer = Writer(path, version=9, storage_plugin=storage)
        self.connections = {}

    def write(self, topic, stamp, message):
        kind = message.__msgtype__
        if topic not in self.connections:
            self.connections[topic] = self.writer.add_connection(topic, kind, typestore=TYPES)
        raw = TYPES.serialize_cdr(message, kind)
        self.writer.write(self.connections[topic], round(stamp * 1e9), raw)


def make(kind, **values):
    return TYPES.types[kind](**values)


def header(stamp, frame):
    seconds = int(stamp)
    time = make('builtin_interfaces/msg/Time', sec=seconds, nanosec=round((stamp - seconds) * 1e9))
    return make('std_msgs/msg/Header', stamp=time, frame_id=frame)


def image_message(stamp, frame, encoding, pixels):
    return make(
        'sensor_msgs/msg/Image',
        header=header(stamp, frame),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=pixels.strides[0],
        data=np.frombuffer(pixels.tobytes(), np.uint8),
    )


def compressed_message(stamp, frame, pixels):
    data = cv2.imencode('.png', pixels[..., ::-1])[1].ravel()
    return make(
        'sensor_msgs/msg/CompressedImage', header=header(stamp, frame), format='png', data=data
    )


def transform(stamp, parent, child, values):
    vector = make('geometry_msgs/msg/Vector3', **dict(zip('xyz', values[:3])))
    rotation = make('geometry_msgs/msg/Quaternion', **dict(zip('xyzw', values[3:])))
    return make(
        'tf2_msgs/msg/TFMessage',
        transforms=[
            make(
                'geometry_msgs/msg/TransformStamped',
                header=header(stamp, parent),
                child_frame_id=child,
                transform=make(
                    'geometry_msgs/msg/Transform', translation=vector, rotation=rotation
                ),
            )
        ],
    )


def stamped_pose(stamp, frame, values):
    point = make('geometry_msgs/msg/Point', **dict(zip('xyz', values[:3])))
    rotation = make('geometry_msgs/msg/Quaternion', **dict(zip('xyzw', values[3:])))
    pose = make('geometry_msgs/msg/Pose', position=point, orientation=rotation)
    return make('geometry_msgs/msg/PoseStamped', header=header(stamp, frame), pose=pose)


def odometry(stamp, frame, child, values):
    covariance = np.zeros(36)
    pose = stamped_pose(stamp, frame, values).pose
    zero = make('geometry_msgs/msg/Vector3', x=0.0, y=0.0, z=0.0)
    twist = make('geometry_msgs/msg/Twist', linear=zero, angular=zero)
    return make(
        'nav_msgs/msg/Odometry',
        header=header(stamp, frame),
        child_frame_id=child,
        pose=make('geometry_msgs/msg/PoseWithCovariance', pose=pose, covariance=covariance),
        twist=make('geometry_msgs/msg/TwistWithCovariance', twist=twist, covariance=covariance),
    )


def write_bag(
    folder,
    scene,
    poses='pose',
    depth_frame='optical',
    storage=StoragePlugin.SQLITE3,
    compressed=False,
):
    """Write a bag; `poses`: a 'pose', 'tf' or 'odometry' of a base with the camera, or 'none'."""
    path = folder / 'bag'
    bag = BagWriter(path, storage)
    # The camera looks along the base's x axis, 20 cm above it (REP-103).
    base_from_camera = np.eye(4)
    base_from_camera[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    base_from_camera[2, 3] = 0.2
    with bag.writer:
        if poses in ('tf', 'odometry'):
            bag.write(
                '/tf_static',
                START,
                transform(START, 'base', 'optical', pose_values(base_from_camera)),
            )
        for number in range(FRAMES):
            stamp = START + PERIOD * number
            image = scene.images[number]
            if compressed:
                message = compressed_message(stamp, 'optical', image)
                bag.write('/camera/image_raw/compressed', stamp, message)
            else:
                message = image_message(stamp, 'optical', 'rgb8', image)
                bag.write('/camera/image_raw', stamp, message)
            metres = np.where(np.arange(WIDTH) == 0, np.nan, scene.depth[number])
            bag.write(
                '/camera/depth',
                stamp,
                image_message(stamp, depth_frame, '32FC1', metres.astype(np.float32)),
            )
            matrix = scene.matrix.double().numpy().ravel()
            bag.write(
                '/camera/camera_info',
                stamp,
                make(
                    'sensor_msgs/msg/CameraInfo',
                    header=header(stamp, 'optical'),
                    height=HEIGHT,
                    width=WIDTH,
                    distortion_model='plumb_bob',
                    d=np.zeros(5),
                    k=matrix,
                    r=np.eye(3).ravel(),
                    p=np.zeros(12),
                    binning_x=0,
                    binning_y=0,
                    roi=make(
                        'sensor_msgs/msg/RegionOfInterest',
                        x_offset=0,
                        y_offset=0,
                        height=0,
                        width=0,
                        do_rectify=False,
                    ),
                ),
            )
            pose = scene.poses[number]
            if poses == 'pose':
                bag.write('/pose', stamp, stamped_pose(stamp, 'map', pose_values(pose)))
            if poses == 'tf':
                map_from_base = pose_values(pose @ np.linalg.inv(base_from_camera))
                bag.write('/tf', stamp, transform(stamp, 'map', 'base', map_from_base))
            if poses == 'odometry':
                odom_from_base = pose_values(pose @ np.linalg.inv(base_from_camera))
                bag.write('/odom', stamp, odometry(stamp, 'odom', 'base', odom_from_base))
    return path


def write_bag_with_tf(folder, scene):
    return write_bag(folder, scene, poses='tf')


def write_mcap_with_odometry(folder, scene):
    return write_bag(folder, scene, poses='odometry', storage=StoragePlugin.MCAP)


def write_compressed_bag(folder, scene):
    return write_bag(folder, scene, compressed=True)


WRITERS = {
    'tum': (write_tum, 1 / 5000),
    '7-scenes': (write_seven_scenes, 1 / 1000),
    'bag': (write_bag, 1e-6),
    'bag with compressed images': (write_compressed_bag, 1e-6),
    'bag with tf': (write_bag_with_tf, 1e-6),
    'mcap with odometry': (write_mcap_with_odometry, 1e-6),
}


@pytest.mark.parametrize('name', WRITERS)
def test_a_recording_is_read_as_it_was_written(tmp_path, scene, name):
    write, unit = WRITERS[name]
    recording = open_recording(write(tmp_path, scene))
    assert len(recording) == FRAMES
    for number in (0, FRAMES - 1):
        frame = recording.frame(number)
        assert np.array_equal(frame.image, scene.images[number])
        known = np.isfinite(frame.depth)
        assert not known[0, 0] and known[1:, 1:].all()
        assert np.abs(frame.depth - scene.depth[number])[known].max() <= 0.51 * unit + 1e-6
        assert np.abs(frame.world_from_camera - scene.poses[number]).max() < 1e-6
        if name != '7-scenes':  # whose focal length is fixed
            assert np.abs(frame.intrinsics - scene.matrix.numpy()).max() < 1e-4


def test_a_euroc_sequence_is_read_without_depth(tmp_path, scene):
    recording = open_recording(write_euroc(tmp_path, scene))
    assert len(recording) == FRAMES
    frame = recording.frame(FRAMES - 1)
    assert frame.stamp == pytest.approx(START + PERIOD * (FRAMES - 1), abs=1e-6)
    assert frame.image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(frame.world_from_camera - scene.poses[-1]).max() < 1e-6
    assert frame.calibration.distortion_model == 'plumb_bob'
    assert frame.calibration.D.tolist() == [-0.28, 0.07, 0.0002, 0.00002]
    assert np.isnan(frame.depth).all()
    with pytest.raises(ValueError, match='has no depth; expected a recording with it'):
        RecordedDataset([recording], 'train', 0, 42, 4)


@pytest.mark.parametrize(
    ('file', 'text', 'sentence'),
    [
        ('cam0/sensor.yaml', 'intrinsics: [1, 2]', 'does not describe a camera'),
        (
            'cam0/data.csv',
            '12;a.png',
            r"has the line '12;a.png'; expected lines of 2 or more values",
        ),
        ('state_groundtruth_estimate0/data.csv', '1,2,3', 'expected lines of 8 or more values'),
        ('state_groundtruth_estimate0/data.csv', '1' + ',0' * 6 + ',1', 'has a pose'),
    ],
)
def test_an_incomplete_euroc_sequence_is_rejected(tmp_path, scene, file, text, sentence):
    folder = write_euroc(tmp_path, scene)
    (folder / 'mav0' / file).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        open_recording(folder)


def test_windows_of_a_recording_are_consistent(tmp_path, scene):
    source = RecordedDataset([open_recording(write_tum(tmp_path, scene))], 'train', 0, 42, 4, 6)
    sample = source.batch(0, 3, 4)
    truth = sample.truth
    assert sample.images.shape == (3, 4, 3, 28, 42)
    assert truth.tracks.shape == (3, 4, 6, 2) and truth.visible[:, 0].all()
    first = truth.camera_from_world[:, 0]
    torch.testing.assert_close(first, torch.eye(4)[:3].expand(3, 3, 4), atol=1e-5, rtol=0)
    # Points of the first frame, seen by the last camera, lie where its own depth says.
    world = truth.points[:, 0].flatten(1, 2)
    pixels, in_camera = project(world, truth.camera_from_world[:, -1], truth.intrinsics[:, -1])
    limit = torch.tensor([41, 27])
    inside = ((pixels >= 0) & (pixels <= limit)).all(-1) & truth.valid[:, 0].flatten(1)
    columns, rows = torch.where(inside[..., None], pixels, 0.0).round().long().unbind(-1)
    depth = truth.depth[:, -1].flatten(1).gather(1, rows * 42 + columns)
    error = (in_camera[..., 2] / depth - 1).abs()[inside]
    assert inside.sum() > 500 and error.median() < 0.01
    # Motion is the camera's own.
    back = invert_rigid(truth.camera_from_world)
    torch.testing.assert_close(
        transform_points(back[:, -1], in_camera), world, atol=1e-4, rtol=1e-4
    )
    again = source.batch(1, 1, 4)
    assert torch.equal(again.images[0], sample.images[1])
    assert torch.equal(again.truth.depth[0], truth.depth[1])


def test_splits_of_a_recording_share_no_frame(tmp_path, scene):
    recording = open_recording(write_tum(tmp_path, scene))
    parts = [set(split_frames(len(recording), split)) for split in ('train', 'validation', 'test')]
    assert set.union(*parts) == set(range(FRAMES)) and sum(map(len, parts)) == FRAMES
    with pytest.raises(ValueError, match='1 frames for validation; expected at least the 2'):
        RecordedDataset([recording], 'validation', 0, 42)
    with pytest.raises(ValueError, match='3 frames in a window; expected at most 2'):
        RecordedDataset([recording], 'train', 0, 42).batch(0, 1, 3)


def test_poses_are_interpolated():
    stamps = np.array([0.0, 1.0, 5.0])
    half = np.sqrt(0.5)
    poses = np.array(
        [[0, 0, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, -half, -half], [4, 0, 0, 0, 0, 1, 0.0]]
    )
    found = interpolate_poses(stamps, poses, np.array([0.5, 1.0, 3.0, -0.4, -0.9]), 1.5, 0.75)
    assert found[0, :3, 3].tolist() == [1, 0, 0]
    assert found[0, :2, :2] == pytest.approx(np.array([[half, -half], [half, half]]))  # 45°
    assert found[1, :2, :2] == pytest.approx(np.array([[0, -1], [1, 0]]))  # 90°
    assert np.isnan(found[2]).all()  # a gap of four seconds is too large
    assert found[3, :3, 3].tolist() == [0, 0, 0]
    assert np.isnan(found[4]).all()


def test_what_is_no_recording_is_rejected(tmp_path, scene):
    with pytest.raises(ValueError, match='is no recording with ground truth'):
        open_recording(tmp_path)
    folder = write_tum(tmp_path / 'tum', scene)
    (folder / 'groundtruth.txt').write_text('1 2 3\n')
    with pytest.raises(ValueError, match="the line '1 2 3'; expected lines of 8 values"):
        open_recording(folder)
    (folder / 'groundtruth.txt').write_text('0 0 0 0 0 0 0 1\n')
    with pytest.raises(ValueError, match=r'of 10 colour images 10 .* none of these has a pose'):
        open_recording(folder)
    (folder / 'groundtruth.txt').unlink()
    with pytest.raises(ValueError, match=r'groundtruth\.txt cannot be read'):
        open_recording(folder)
    seven = tmp_path / 'seven'
    seven.mkdir()
    write_seven_scenes(seven, scene)
    (seven / 'frame-000001.pose.txt').write_text('1 0 0')
    with pytest.raises(ValueError, match='has 3 numbers; expected a 4 × 4 matrix'):
        open_recording(seven)


def test_depth_of_the_wrong_type_is_rejected(tmp_path, scene):
    folder = write_tum(tmp_path, scene)
    write_image(folder / 'depth/0.png', np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r'uint8 .* expected one channel of 16 bits'):
        open_recording(folder).frame(0)


def test_incomplete_bags_are_rejected(tmp_path, scene):
    with pytest.raises(ValueError, match=r"nothing gives the motion of 'optical' in 'optical'"):
        open_recording(write_bag(tmp_path, scene, poses='none'))
    (tmp_path / 'other').mkdir()
    other = write_bag(tmp_path / 'other', scene, depth_frame='depth_optical')
    with pytest.raises(ValueError, match=r"in the frame 'depth_optical'.*registered to colour"):
        open_recording(other)
    with pytest.raises(
        ValueError, match="found image topics: /camera/image_raw; expected '/image'"
    ):
        BagRecording(other, image_topic='/image')
    (other / 'metadata.yaml').write_text('nonsense')
    with pytest.raises(ValueError, match='cannot be read as a bag'):
        open_recording(other)


@pytest.mark.parametrize('odom_frame', ['map', 'odom'])
def test_the_fixed_frame_of_a_bag_is_a_parameter(tmp_path, scene, odom_frame):
    source = open_frames(str(write_bag(tmp_path, scene, poses='tf')), odom_frame=odom_frame)
    settings = Settings.from_flat(
        {
            'window_size': 4,
            'window_stride': 2,
            'min_parallax': 0.0,
            'scale_source': 'tf',
            'scale_min_travel': 0.0,
        }
    )
    engine = StreamingEngine(settings, FakeNetwork(), source.scale_source(settings.scale))
    updates = [update for _, frame in source.frames() if (update := engine.add(frame))]
    assert updates[-1].metric.valid == (odom_frame == 'map')


def test_the_command_evaluates_a_recording(tmp_path, scene, capsys):
    recording = write_tum(tmp_path / 'tum', scene)
    file, output = tmp_path / 'figures.json', tmp_path / 'figures'
    arguments = ['--recording', str(recording), '--output', str(output), '--json', str(file)]
    assert Evaluate.main([*arguments, '--device', 'cpu']) == 0
    assert 'ate_percent' in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert (figures['recording'], figures['maps']) == ('tum', 1)
    rows = np.loadtxt(output / 'truth.tum')
    assert len(rows) == figures['frames'] >= 8
    assert (output / 'path.png').exists() and (output / 'estimate.tum').exists()


def test_the_command_fine_tunes_on_a_recording(tmp_path, scene, monkeypatch, capsys):
    recording = write_tum(tmp_path / 'tum', scene)
    longer = {}
    for name in ('rgb.txt', 'depth.txt', 'groundtruth.txt'):  # forwards and backwards, three times
        rows = [line.split(maxsplit=1) for line in (recording / name).read_text().splitlines()[1:]]
        longer[name] = [
            f'{START + PERIOD * index:.6f} {row[1]}'
            for index, row in enumerate((rows + rows[::-1]) * 3)
        ]
        (recording / name).write_text('\n'.join(longer[name]))

    for name in ('no_matching', 'fine_tune'):  # the real ones take minutes
        shorter = replace(RECIPES[name], validation_windows=2)
        monkeypatch.setitem(RECIPES, name, shorter)

    def run(*more):
        common = ['--batch', '2', '--frames', '2', '--width', '56', '--device', 'cpu']
        return Train.main([*common, '--data', str(recording), *more])

    first, second = tmp_path / 'first', tmp_path / 'second'
    assert run('--folder', str(first), '--recipe', 'no_matching', '--windows', '2') == 0
    trained = first / 'best.pt'
    assert load_network(ModelSettings(checkpoint=str(trained), device='cpu')).trained
    arguments = ['--folder', str(second), '--recipe', 'fine_tune', '--windows', '4']
    assert run(*arguments, '--until', '2', '--checkpoint', str(trained)) == 0
    before, after = (
        torch.load(folder / 'last.pt', weights_only=True)['model'] for folder in (first, second)
    )
    begun = torch.load(trained, weights_only=True)['model']
    assert before.keys() == after.keys() == begun.keys()
    moved = {name.split('.')[0] for name in after if not torch.equal(after[name], begun[name])}
    assert moved == {'camera_head', 'depth_head'}
    assert run('--folder', str(first), '--data', str(tmp_path)) == 2
    assert 'is no recording with ground truth' in capsys.readouterr().err
