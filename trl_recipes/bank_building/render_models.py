"""Renders OBJ models off screen with VTK. `furniture` runs it as a process of its own, since a model may crash VTK.

python -m trl_recipes.bank_building.render_models jobs.json FOLDER VIEWS
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import vtkmodules.vtkRenderingOpenGL2  # noqa: F401 (the backend that draws)
from PIL import Image
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkObject
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkIOImport import vtkOBJImporter
from vtkmodules.vtkRenderingCore import vtkLight, vtkRenderer, vtkRenderWindow, vtkWindowToImageFilter

from .furniture import CURRENT
from .pictures import cut_out, encode

SIDE = 560  # pixels, several times what is kept: that smooths the edges
HEIGHTS = (12.0, 22.0, 32.0)  # of the camera, degrees
SEE_THROUGH = 0.65  # least opacity: glass must leave a mask
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
EDGE_ON = 0.12  # a view narrower than this share of the widest is left out: a door from the side


def render(obj: Path, views: int, turned: Sequence[float] = UPRIGHT) -> list[Image.Image]:
    """The model from `views` sides, RGBA, its front first; fewer where a side shows it edge-on.

    `turned` is a 3x3 rotation, row by row, that puts the model on its feet.

    Raises:
        ValueError: nothing can be seen of it.
    """
    window, renderer = _stage()
    importer = vtkOBJImporter()
    importer.SetFileName(str(obj))
    importer.SetFileNameMTL(str(obj.with_suffix(".mtl")))
    importer.SetTexturePath(str(obj.parent))
    importer.SetRenderWindow(window)
    importer.Update()
    actors = renderer.GetActors()
    actors.InitTraversal()
    upright = vtkMatrix4x4()
    for place, value in enumerate(turned):
        upright.SetElement(place // 3, place % 3, value)
    while actor := actors.GetNextActor():
        actor.SetUserMatrix(upright)
        surface = actor.GetProperty()
        surface.SetOpacity(max(surface.GetOpacity(), SEE_THROUGH))
        surface.SetAmbient(0.25)
        surface.SetAmbientColor(surface.GetDiffuseColor())
    pictures = [_view(window, renderer, 20.0 + 360.0 * number / views, HEIGHTS[number % 3]) for number in range(views)]
    window.Finalize()
    boxes = [picture.getbbox() for picture in pictures]
    widths = [box[2] - box[0] if box else 0 for box in boxes]
    if not max(widths, default=0):
        raise ValueError("nothing of it can be seen")
    return [picture for picture, width in zip(pictures, widths, strict=True) if width >= EDGE_ON * max(widths)]


def _stage() -> tuple[vtkRenderWindow, vtkRenderer]:
    window, renderer = vtkRenderWindow(), vtkRenderer()
    window.SetOffScreenRendering(1)
    window.SetAlphaBitPlanes(1)
    window.SetMultiSamples(0)
    window.SetSize(SIDE, SIDE)
    renderer.SetBackground(0.0, 0.0, 0.0)
    renderer.SetBackgroundAlpha(0.0)
    renderer.AutomaticLightCreationOff()
    for place, strength in (((-0.6, 1.0, 1.0), 0.75), ((1.0, 0.4, 0.6), 0.3), ((0.0, 0.6, -1.0), 0.2)):
        light = vtkLight()
        light.SetLightTypeToCameraLight()
        light.SetPosition(*place)
        light.SetIntensity(strength)
        renderer.AddLight(light)
    window.AddRenderer(renderer)
    return window, renderer


def _view(window: vtkRenderWindow, renderer: vtkRenderer, turn: float, height: float) -> Image.Image:
    camera = renderer.GetActiveCamera()
    camera.SetFocalPoint(0, 0, 0)
    camera.SetPosition(0, 0, 1)
    camera.SetViewUp(0, 1, 0)
    camera.Azimuth(turn)
    camera.Elevation(height)
    renderer.ResetCamera()
    renderer.ResetCameraClippingRange()
    window.Render()
    grab = vtkWindowToImageFilter()
    grab.SetInput(window)
    grab.SetInputBufferTypeToRGBA()
    grab.ReadFrontBufferOff()
    grab.Update()
    pixels = vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars()).reshape(SIDE, SIDE, 4)[::-1]
    return Image.fromarray(np.ascontiguousarray(pixels))


def tidy_obj(path: Path) -> None:
    """Mends in an OBJ file what VTK cannot take.

    Faces of fewer than three corners, at which it gives up, are taken out. Where only some faces have texture
    coordinates, which makes it drop all textures, the others get the first one.
    """
    lines = path.read_bytes().replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").splitlines()
    textured = any(line.startswith(b"vt ") for line in lines)
    kept = []
    for line in lines:
        if line.startswith(b"f "):
            corners = line.split()[1:]
            if len(corners) < 3:
                continue
            if textured:
                line = b" ".join([b"f", *map(_with_texture, corners)])
        kept.append(line)
    path.write_bytes(b"\n".join(kept) + b"\n")


def _with_texture(corner: bytes) -> bytes:
    # point/texture/normal; the last two may be left out
    point, *rest = corner.split(b"/")
    return b"/".join([point, rest[0] if rest and rest[0] else b"1", *rest[1:]])


def render_job(archive: Path, file: str, target: Path, views: int, turned: Sequence[float] = UPRIGHT) -> None:
    """Renders one model of a catalogue into the folder `target`, which appears when all views are there."""
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix="partial-") as name,
        zipfile.ZipFile(archive) as catalogue,
    ):
        inside = file.rpartition("/")[0] + "/"
        catalogue.extractall(name, [one for one in catalogue.namelist() if one.startswith(inside)])
        tidy_obj(Path(name) / file)
        done = Path(name) / "views"
        done.mkdir()
        for number, picture in enumerate(render(Path(name) / file, views, turned)):
            (done / f"{number}.webp").write_bytes(encode(cut_out(picture), quality=95))
        if not target.exists():  # a renderer of a run that was killed may just have made it
            done.rename(target)


def main(arguments: list[str]) -> None:
    """Renders the jobs of a file in order; the model at work is named in `current.txt`."""
    jobs, folder, views = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    vtkObject.GlobalWarningDisplayOff()
    parent = os.getppid()
    for identifier, archive, file, slug, turned in json.loads(jobs.read_text(encoding="utf-8")):
        if os.getppid() != parent:  # whoever started this was killed
            return
        (folder / CURRENT).write_text(identifier, encoding="utf-8")
        render_job(Path(archive), file, folder / slug, views, turned)
    (folder / CURRENT).unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
