# SPDX-License-Identifier: Apache-2.0
"""
A headless browser for the viewer's page, and a scene for it.

As a program it takes the screenshot of the documentation:

    python test/viewer_page.py docs/viewer.png
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vggt_ros.geometry.camera import transform_points, unproject
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene as Room
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.viewer.scene import SceneCamera, ViewerScene, make_thumbnail
from vggt_ros.viewer.viewer import Viewer

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
ARGUMENTS = (
    '--no-sandbox',
    '--use-angle=swiftshader',
    '--enable-unsafe-swiftshader',
    '--ignore-gpu-blocklist',
)


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def open_page(width: int = 1200, height: int = 750):
    """Open a browser and yield an empty page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(ARGUMENTS))
        try:
            yield browser.new_page(viewport={'width': width, 'height': height})
        finally:
            browser.close()


def take_screenshot(page) -> np.ndarray:
    """Return the visible page: (H, W, 3), RGB."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('RGB'))


def wait_for(condition, seconds: float = 30.0, what: str = 'it'):
    """Wait until a condition holds; return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f'waited {seconds} s in vain for {what}'
        time.sleep(0.2)
    return found


def room_scene(
    frames: int = 36, step: float = 0.16, seed: int = 5, stride: int = 3
) -> ViewerScene:
    """Render a drive through a furnished room with true depth; confidence decreases with depth."""
    height, width, fov = 240, 320, math.radians(70)
    focal = width / 2 / math.tan(fov / 2)
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    poses = smooth_trajectory(frames, seed, step)
    images, depth = render(Room.room(seed), poses, intrinsics.expand(frames, 3, 3), height, width)
    world_from_room = torch.linalg.inv(poses[0].double())
    world_from_camera = world_from_room @ poses.double()
    points = unproject(depth, intrinsics.expand(frames, 3, 3))[:, ::stride, ::stride]
    count = points[0, ..., 0].numel()
    xyz = transform_points(world_from_camera.float(), points.reshape(frames, count, 3))
    sampled_depth = depth[:, ::stride, ::stride].reshape(-1).numpy()
    thumbnails = [make_thumbnail(image.numpy(), intrinsics.double().numpy()) for image in images]
    return ViewerScene(
        title='a furnished room, ray-cast',
        warning='',
        unit='m',
        cameras=tuple(
            SceneCamera(i * 200_000_000, world_from_camera[i].numpy(), scaled, image)
            for i, (image, scaled) in enumerate(thumbnails)
        ),
        xyz=xyz.reshape(-1, 3).numpy(),
        rgb=images[:, ::stride, ::stride].reshape(-1, 3).numpy(),
        confidence=(1 + 8 / sampled_depth**2).astype(np.float32),
        frame=np.repeat(np.arange(frames, dtype=np.int32), count),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('output', type=Path)
    output = parser.parse_args().output
    viewer = Viewer(port=8123)
    try:
        with open_page(1400, 820) as page:
            viewer.show(room_scene())
            wait_for(lambda: viewer.points_shown, what='points')
            page.goto(viewer.url)
            page.wait_for_selector('text=points shown', timeout=60_000)
            page.locator('.mantine-Notification-closeButton').click()  # about software rendering
            page.wait_for_timeout(6000)
            Image.fromarray(take_screenshot(page)).quantize(256).save(output, optimize=True)
    finally:
        viewer.close()


if __name__ == '__main__':
    main()
