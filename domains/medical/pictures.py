"""Pictures of label maps that a radiologist could judge: cuts beside each other, contours, sides, a scale and a legend.

Planes are shown in radiological convention: the patient's right on the left, front or head up.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from domains.medical.data._reading import NIFTI, PICTURES
from domains.medical.metrics import labelled_planes

Array = NDArray[Any]

# Colours that stay apart as a translucent layer on grey; more classes go on with matplotlib's.
_COLOURS = ("#FFA500", "#00D0FF", "#00B050", "#FFFF33", "#2A4BFF", "#FF3B30", "#C77DE8")
_PANEL = 2.5  # inches, the longest side of a panel
_GAP, _HEADING, _LINE, _LEAST_WIDTH = 0.1, 0.24, 0.17, 4.6  # inches
_DPI = 110
_PLANES = ("sagittal", "coronal", "axial")  # across the axes R, A and S
_LETTERS = ("AP", "RL", "RL"), ("SI", "SI", "AP")  # (left, right) and (top, bottom) of these planes
_BARS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_LEGEND_ALL = 12  # with more classes, the legend names those that are seen


@dataclass(frozen=True, kw_only=True)
class View:
    """A plane as it is shown: rows from top to bottom, columns from left to right.

    Attributes:
        name: What it is called.
        image: (h, w), grey.
        reference: (h, w) classes; None where there is none.
        prediction: (h, w) classes; None where there is none.
        sides: Size of a pixel downwards and to the right.
        letters: Directions at the left, right, upper and lower border; "" where they are unknown.
    """

    name: str
    image: Array
    reference: Array | None
    prediction: Array | None
    sides: tuple[float, float] = (1.0, 1.0)
    letters: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A case to be shown.

    Attributes:
        image: (*spatial), grey.
        affine: (4, 4), voxels to RAS+ millimetres; None for an image (2D) that is shown as stored, rows downwards.
        reference: Classes (*spatial), with values beyond the classes where there is no label; None for none.
        prediction: Classes (*spatial); None for none.
    """

    image: Array
    affine: Array | None
    reference: Array | None = None
    prediction: Array | None = None

    def upright(self) -> Scene:
        """Return the scene with its axes turned to R, A and S, whichever are nearest to them."""
        if self.affine is None:
            return self
        turn = nib.orientations.io_orientation(self.affine)
        arrays = {
            name: None if array is None else nib.orientations.apply_orientation(array, turn)
            for name, array in (("image", self.image), ("reference", self.reference), ("prediction", self.prediction))
        }
        return Scene(affine=self.affine @ nib.orientations.inv_ornt_aff(turn, self.image.shape), **arrays)

    def view(self, axis: int, plane: int) -> View:
        """Cut an upright scene across one of its axes."""
        if self.affine is None:
            raise ValueError("An image is a plane already; see `views`.")
        image, reference, prediction = (
            None if array is None else array.take(plane, axis)[::-1, ::-1].T
            for array in (self.image, self.reference, self.prediction)
        )
        point = [(side - 1) / 2 for side in self.image.shape]
        point[axis] = plane
        place = (self.affine @ [*point, 1.0])[axis]
        across, down = (other for other in range(3) if other != axis)
        sizes = nib.affines.voxel_sizes(self.affine)
        return View(
            name=f"{_PLANES[axis]}, {'xyz'[axis]} = {place:.0f} mm",
            image=image,
            reference=reference,
            prediction=prediction,
            sides=(float(sizes[down]), float(sizes[across])),
            letters=_LETTERS[0][axis] + _LETTERS[1][axis],
        )


def telling_plane(labels: Array, axis: int, classes: int) -> int:
    """Return the plane across an axis that shows most of the classes, each counted by its share of its own largest cut.

    Args:
        labels: Classes (*spatial); values from `classes` on are no label.
        axis: The axis.
        classes: K, with the background.
    """
    others = tuple(other for other in range(labels.ndim) if other != axis)
    profiles = [(labels == number).sum(axis=others) for number in range(1, classes)]
    shown = [profile / profile.max() for profile in profiles if profile.any()]
    return int(np.argmax(sum(shown))) if shown else labels.shape[axis] // 2


def views_of(scene: Scene, classes: int) -> list[View]:
    """Choose what to show of a case.

    Args:
        scene: The case.
        classes: K, with the background.

    Returns:
        The image itself (2D); of a volume the axial, coronal and sagittal plane that show most of the labels.
    """
    if scene.affine is None:
        return [View(name="", image=scene.image, reference=scene.reference, prediction=scene.prediction)]
    scene = scene.upright()
    labels = scene.prediction if scene.reference is None else scene.reference
    shape = scene.image.shape
    places = [side // 2 if labels is None else telling_plane(labels, axis, classes) for axis, side in enumerate(shape)]
    flat = [axis for axis in range(3) if shape[axis] == 1]
    return [scene.view(axis, places[axis]) for axis in flat[:1] or (2, 1, 0)]


def strip_of(scene: Scene, axis: int, planes: Sequence[int], most: int = 4) -> list[View]:
    """Cut a volume across one of its stored axes, at a few of some planes.

    Args:
        scene: The case, as it is stored.
        axis: The axis that the planes count along.
        planes: The planes to choose from, in order.
        most: How many to show, the middle ones of as many parts.
    """
    if scene.affine is None:
        raise ValueError("An image has no planes to choose from; see `views_of`.")
    turn = nib.orientations.io_orientation(scene.affine)
    towards, sign = int(turn[axis, 0]), int(turn[axis, 1])
    last = scene.image.shape[axis] - 1
    chosen = [
        planes[int((part + 0.5) * len(planes) / min(most, len(planes)))] for part in range(min(most, len(planes)))
    ]
    upright = scene.upright()
    return [upright.view(towards, plane if sign > 0 else last - plane) for plane in chosen]


def picture_of(case: Mapping[str, Any], class_names: Sequence[str], prediction: Array, *, title: str = "") -> bytes:
    """Draw a case: three planes of a volume, a few of its labelled planes where only those are labelled, or the image.

    Args:
        case: What `VolumeData.case` returns; a case without `label` has no reference.
        class_names: Names of the classes; the first is the background.
        prediction: Classes (*spatial).
        title: A line above.

    Returns:
        A PNG.
    """
    image = np.asarray(case["image"])
    grey = image.mean(axis=0) if image.ndim == 3 and len(image) == 3 else image[0]
    reference = None if case.get("label") is None else np.asarray(case["label"])
    arrays = [grey, reference, prediction]
    affine, unit = case["affine"], "mm"
    if grey.ndim == 2:
        name = None if case["path"] is None else Path(case["path"]).name.lower()
        if name is not None and name.endswith(NIFTI) and not np.array_equal(affine, np.eye(4)):
            arrays = [None if array is None else array[..., None] for array in arrays]
        elif name is None:  # a plane of a starter: its second axis upwards, as in a plane of a volume
            arrays, affine = [None if array is None else array.T[::-1] for array in arrays], None
        else:  # its rows run downwards; a picture knows nothing of a patient, and an X-ray seldom says how it lies
            affine, unit = None, "px" if name.endswith(PICTURES) else "mm"
    grey, reference, prediction = arrays
    scene = Scene(image=grey, affine=affine, reference=reference, prediction=prediction)
    axis = None if reference is None or affine is None else labelled_planes(reference < len(class_names))
    if axis is None or reference is None:
        views = views_of(scene, len(class_names))
    else:
        others = tuple(other for other in range(3) if other != axis)
        views = strip_of(scene, axis, np.flatnonzero((reference < len(class_names)).any(axis=others)).tolist())
    return draw(views, class_names, title=title, unit=unit)


# ---- drawing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A place on the page, in inches from its upper left corner, and how a view fits into it.

    Attributes:
        left: Of the image.
        top: Of the image.
        scale: Inches per unit of `View.sides`.
    """

    left: float
    top: float
    scale: float

    def points(self, view: View, corners: Array) -> Array:
        """Bring corners of pixels (N, 2), counted to the right and downwards, onto the page."""
        return corners * (view.sides[1] * self.scale, view.sides[0] * self.scale) + (self.left, self.top)

    def extent(self, view: View) -> tuple[float, float, float, float]:
        """Return left, right, bottom and top of the view."""
        height, width = _extent(view)
        return self.left, self.left + width * self.scale, self.top + height * self.scale, self.top


def draw(views: Sequence[View], class_names: Sequence[str], *, title: str = "", unit: str = "mm") -> bytes:
    """Draw a row for each view, all at one scale: the image, the reference and the prediction, as far as there are any.

    Args:
        views: At least one; all with reference or none, all with prediction or none.
        class_names: Names of the classes; the first is the background and not drawn.
        title: A line above.
        unit: Of `View.sides`.

    Returns:
        A PNG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ["image"]
    columns += ["reference"] if views[0].reference is not None else []
    columns += ["prediction"] if views[0].prediction is not None else []
    window = _window([view.image for view in views])
    scale = _PANEL / max(side for view in views for side in _extent(view))
    step = max(_extent(view)[1] for view in views) * scale + _GAP
    width = max(step * len(columns) + _GAP, _LEAST_WIDTH)
    tops = [_HEADING + (_HEADING if title else 0.0)]
    for view in views:
        tops.append(tops[-1] + _extent(view)[0] * scale + _HEADING)
    entries = _legend(views, class_names)
    bottom = tops.pop() - _HEADING + _GAP
    beside = max(1, int((width - _GAP) / (0.45 + 0.075 * max((len(name) for name, _ in entries), default=1))))
    lines = -(-len(entries) // beside)
    height = bottom + _LINE * lines
    with mpl.rc_context({"font.size": 8, "font.family": "sans-serif", "text.parse_math": False}):
        figure: Any = Figure(figsize=(width, height), dpi=_DPI)
        FigureCanvasAgg(figure)
        # One pair of axes in inches for the whole page: a pair for each panel would take most of the time.
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        start = (width - step * len(columns) + _GAP) / 2
        for top, view in zip(tops, views, strict=True):
            for number, column in enumerate(columns):
                left = start + number * step + (step - _GAP - _extent(view)[1] * scale) / 2
                _draw_panel(axes, _Panel(left=left, top=top, scale=scale), view, column, len(class_names), window, unit)
        axes.text(width / 2, 0.08, title, fontsize=9, ha="center", va="top")
        for place, (name, colour) in enumerate(entries):
            column, row = divmod(place, lines)
            x, y = 1.5 * _GAP + column * (width - _GAP) / beside, bottom + row * _LINE
            axes.add_artist(
                mpl.patches.Rectangle((x, y), 0.2, 0.1, facecolor=colour, edgecolor="#808080", linewidth=0.4)
            )
            axes.text(x + 0.26, y + 0.05, name, fontsize=8, va="center")
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(
    axes: Any,  # noqa: ANN401 (matplotlib is half typed)
    panel: _Panel,
    view: View,
    column: str,
    classes: int,
    window: tuple[float, float],
    unit: str,
) -> None:
    left, right, bottom, top = extent = panel.extent(view)
    axes.imshow(view.image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent)
    labels = {"reference": view.reference, "prediction": view.prediction}.get(column)
    name = ", ".join(part for part in (column, view.name if column == "image" else "") if part)
    if labels is not None:
        _draw_fill(axes, panel, view, _known(labels, classes), classes)
        if column == "prediction" and view.reference is not None:
            _draw_borders(axes, panel, view, _known(view.reference, classes), "white", 0.6)
        else:
            _draw_outlines(axes, panel, view, _known(labels, classes), classes)
    axes.text((left + right) / 2, top - 0.04, name, fontsize=7, ha="center", va="bottom")
    middle = ((left + right) / 2, (top + bottom) / 2)
    places = ((left + 0.05, middle[1], "left", "center"), (right - 0.05, middle[1], "right", "center"))
    places += ((middle[0], top + 0.04, "center", "top"), (middle[0], bottom - 0.04, "center", "bottom"))
    for letter, (x, y, ha, va) in zip(view.letters, places, strict=False):
        _write(axes, x, y, letter, ha=ha, va=va)
    if column == "image":
        _draw_bar(axes, panel, view, unit)


def _draw_fill(axes: Any, panel: _Panel, view: View, labels: Array, classes: int) -> None:  # noqa: ANN401
    """Fill each class with a translucent colour."""
    from matplotlib.colors import to_rgba

    colours = np.array([to_rgba(colour, 0.45) for colour in _colours(classes)])
    colours[0, 3] = 0
    axes.imshow(colours[labels], interpolation="nearest", extent=panel.extent(view))


def _draw_outlines(axes: Any, panel: _Panel, view: View, labels: Array, classes: int) -> None:  # noqa: ANN401
    """Draw each class's outline in its colour; the smaller one's is on top where two meet."""
    colours = _colours(classes)
    sizes = np.bincount(labels.ravel(), minlength=classes)
    for number in sorted(range(1, classes), key=lambda number: -sizes[number]):
        _draw_borders(axes, panel, view, labels == number, colours[number], 0.9)


def _draw_borders(
    axes: Any,  # noqa: ANN401
    panel: _Panel,
    view: View,
    labels: Array,
    colour: str,
    width: float,
) -> None:
    """Draw the lines between pixels of different value, and around those at the border that are not zero."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    padded = np.pad(labels.astype(np.int16), 1)
    y, x = np.nonzero(np.diff(padded, axis=0))
    level = np.stack([np.stack((x - 1, y), -1), np.stack((x, y), -1)], 1)
    y, x = np.nonzero(np.diff(padded, axis=1))
    upright = np.stack([np.stack((x, y - 1), -1), np.stack((x, y), -1)], 1)
    ends = np.concatenate((level, upright)).reshape(-1, 2)
    if len(ends):
        line = Line(panel.points(view, ends), np.tile([Line.MOVETO, Line.LINETO], len(ends) // 2))
        axes.add_artist(PathPatch(line, fill=False, edgecolor=colour, linewidth=width, capstyle="round"))


def _draw_bar(axes: Any, panel: _Panel, view: View, unit: str) -> None:  # noqa: ANN401
    """Draw a bar of a round length, at most a third of the width."""
    from matplotlib.patheffects import withStroke

    left, _, bottom, _ = panel.extent(view)
    length = max((bar for bar in _BARS if bar <= _extent(view)[1] / 3), default=None)
    if length is None:
        return
    ends, y = [left + 0.08, left + 0.08 + length * panel.scale], bottom - 0.1
    effects = [withStroke(linewidth=3.5, foreground="black")]
    axes.plot(ends, [y, y], color="white", linewidth=2, solid_capstyle="butt", path_effects=effects)
    _write(axes, ends[0], y - 0.04, f"{length} {unit}", ha="left", va="bottom")


def _write(axes: Any, x: float, y: float, text: str, **options: Any) -> None:  # noqa: ANN401
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=1.8, foreground="black")]
    axes.text(x, y, text, color="white", fontsize=7, path_effects=effects, **options)


def _colours(classes: int) -> list[str]:
    """Return a colour for each class; the background's is never used."""
    import matplotlib as mpl

    more = [mpl.colors.to_hex(colour) for colour in mpl.colormaps["tab20"].colors]
    return ["#000000", *((*_COLOURS, *more)[i % (len(_COLOURS) + len(more))] for i in range(classes - 1))]


def _known(labels: Array, classes: int) -> Array:
    """Return the label map with background where there is no label."""
    return np.where(labels < classes, labels, 0)


def _extent(view: View) -> tuple[float, float]:
    """Height and width of a view, in the unit of its sides."""
    height, width = view.image.shape
    return height * view.sides[0], width * view.sides[1]


def _window(images: Sequence[Array]) -> tuple[float, float]:
    """Choose black and white so that neither the empty border nor a few bright voxels decide."""
    values = np.concatenate([image.ravel() for image in images])
    inside = values[values > values.min()]
    if not len(inside):
        return float(values.min()), float(values.min()) + 1.0
    return float(values.min()), float(np.percentile(inside, 99.5))


def _legend(views: Sequence[View], class_names: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and colours: of all classes, or of very many those that are seen, and of lines."""
    numbers = list(range(1, len(class_names)))
    if len(class_names) > _LEGEND_ALL:
        maps = [labels for view in views for labels in (view.reference, view.prediction) if labels is not None]
        numbers = [number for number in numbers if any((labels == number).any() for labels in maps)]
    colours = _colours(len(class_names))
    both = views[0].reference is not None and views[0].prediction is not None
    lines = [("lines: reference", "#FFFFFF")] if both else []
    return [(class_names[number], colours[number]) for number in numbers] + lines
