#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Look at a reconstruction in the browser: cloud, cameras with their pictures, timeline.

A finished folder of `reconstruct`, or one that is being made:

    python -m vggt_ros.cli.view FOLDER [--follow]

What a running node publishes:

    python -m vggt_ros.cli.view --node /vggt --image-topic /camera/image_raw
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vggt_ros.viewer.partial_scene import read_while_growing
from vggt_ros.viewer.read_scene import read_scene
from vggt_ros.viewer.viewer import Viewer, ViewerError, follow


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', nargs='?', type=Path, help='output of reconstruct')
    parser.add_argument('--follow', action='store_true', help='while it is being made')
    parser.add_argument('--node', help='full name of a running node, such as /vggt')
    parser.add_argument('--image-topic', default='', help='of --node: pictures for the cameras')
    parser.add_argument(
        '--host', default='127.0.0.1', help='0.0.0.0 lets other machines see the page, unguarded'
    )
    parser.add_argument('--port', type=int, default=8080, help='or the next one that is free')
    asked = parser.parse_args()
    if (asked.folder is None) == (asked.node is None):
        parser.error('found both or none, expected a FOLDER or --node')
    if asked.node is not None and asked.follow:
        parser.error('--follow is for a FOLDER; --node always goes on')
    if asked.node is None and asked.image_topic:
        parser.error('--image-topic is for --node')
    return asked


def view(asked: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    finished = read_scene(asked.folder) if asked.folder and not asked.follow else None
    viewer = Viewer(asked.host, asked.port)
    try:
        print(f'open {viewer.url} in a browser; Ctrl-C ends it', flush=True)
        if asked.node is not None:
            from vggt_ros.viewer.live_scene import watch_node  # a plain installation has no ROS

            watch_node(asked.node, asked.image_topic, viewer)
        elif finished is not None:
            viewer.show(finished)
            follow(lambda: None, viewer)
        else:
            follow(read_while_growing(asked.folder), viewer)
    finally:
        viewer.close()


def main() -> int:
    """View; 2: there is nothing to view, 1: the page cannot be served."""
    try:
        view(parse())
    except ValueError as error:
        sys.stderr.write(f'view: {error}\n')
        return 2
    except ViewerError as error:
        sys.stderr.write(f'view: {error}\n')
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == '__main__':
    sys.exit(main())
