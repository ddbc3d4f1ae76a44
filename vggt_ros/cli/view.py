#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vggt view`: a reconstruction in the browser."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from vggt_ros.cli.command import COMPLETE, Command, CommandError, Flag


@dataclass(frozen=True)
class View(Command):
    """
    View a reconstruction in the browser: point cloud, cameras with their images, timeline.

    The output folder of `reconstruct`, finished or still growing:

        vggt view FOLDER [--follow]

    What a running node publishes:

        vggt view --node /vggt --image-topic /camera/image_raw
    """

    name: ClassVar[str] = 'view'

    folder: Annotated[Positional[Path | None], arg(metavar='FOLDER')] = None
    """Output folder of `reconstruct`."""
    follow: Flag = False
    """Update the view while `reconstruct` writes the folder."""
    node: str | None = None
    """Full name of a running node, such as /vggt."""
    image_topic: str = ''
    """Image topic for the camera thumbnails, with --node."""
    host: str = '127.0.0.1'
    """Address to serve on; 0.0.0.0 admits every machine, without authentication."""
    port: int = 8080
    """Port to serve on, or the next free one."""

    def run(self) -> int:
        """Serve the page until Ctrl-C."""
        if (self.folder is None) == (self.node is None):
            raise ValueError('found both or none, expected a FOLDER or --node')
        if self.node is not None and self.follow:
            raise ValueError('--follow is for a FOLDER; --node always follows')
        if self.node is None and self.image_topic:
            raise ValueError('--image-topic is for --node')
        from vggt_ros.viewer.viewer import ViewerError

        try:
            self._serve()
        except ViewerError as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            pass  # the usual way to end it
        return COMPLETE

    def _serve(self) -> None:
        from vggt_ros.viewer.partial_scene import read_while_growing
        from vggt_ros.viewer.read_scene import read_scene
        from vggt_ros.viewer.viewer import Viewer, follow

        finished = read_scene(self.folder) if self.folder and not self.follow else None
        viewer = Viewer(self.host, self.port)
        try:
            print(f'open {viewer.url} in a browser; Ctrl-C ends it', flush=True)
            if self.node is not None:
                from vggt_ros.viewer.live_scene import watch_node  # a pip installation has no ROS

                watch_node(self.node, self.image_topic, viewer)
            elif finished is not None:
                viewer.show(finished)
                follow(lambda: None, viewer)
            elif self.folder is not None:
                follow(read_while_growing(self.folder), viewer)
        finally:
            viewer.close()


if __name__ == '__main__':
    sys.exit(View.main())
