"""The demo's pictures and words: contact sheet, joint pictures, crosstalk heat map, report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..pictures import to_image
from ..storage.atomic import replacing

INK, PAPER, FAINT = (32, 34, 40), (255, 255, 255), (120, 124, 132)
TITLES = {"lora": "plain LoRA", "orthogonal": "orthogonal"}
HEADING = "# What the demo measured"
ZOOM = 3  # screen pixels per pixel of a toy picture


def contact_sheet(
    path: Path,
    references: Mapping[str, Tensor],
    sheets: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    columns: int = 6,
) -> None:
    """For each concept its references and, below, what each method draws alone and merged; same noise in a column.

    references: concept -> (N, 3, 32, 32); sheets: method -> concept -> "alone" | "merged" -> (N, 3, 32, 32).
    """
    rows: list[tuple[str, str, Tensor]] = []
    for name, pictures in references.items():
        rows.append((name, "references", pictures))
        for method, drawn in sheets.items():
            for stage in ("alone", "merged"):
                rows.append(("", f"{TITLES[method]}, {stage}", drawn[name][stage]))
    strips = [(title, text, torch.cat(list(pictures[:columns]), dim=-1)) for title, text, pictures in rows]
    _labelled_strips(path, "Three concepts, alone and from one merged model", strips)


def joint_sheet(path: Path, joints: Mapping[str, Tensor]) -> None:
    """joints: method -> (N, 3, 32, 32·k): one row for each method, the same scenes and noise in a column."""
    strips = [
        ("", TITLES[method], torch.cat([*torch.nn.functional.pad(pictures, (0, 3), value=1.0)], dim=-1))
        for method, pictures in joints.items()
    ]
    _labelled_strips(path, "All three in one picture, each in its own third", strips)


def _labelled_strips(path: Path, heading: str, strips: Sequence[tuple[str, str, Tensor]]) -> None:
    from PIL import Image, ImageDraw, ImageFont

    def font(size: int):
        return ImageFont.load_default(size)

    label, gap, top = 190, 6, 46
    height = strips[0][2].shape[1] * ZOOM
    starts, y = [], top
    for title, _, _ in strips:
        y += 14 if title and y > top else 0
        starts.append(y)
        y += height + gap
    width = label + strips[0][2].shape[2] * ZOOM + 14
    image = Image.new("RGB", (width, y + 8), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((14, 12), heading, INK, font(19))
    for (title, text, strip), y in zip(strips, starts, strict=True):
        picture = to_image(strip).resize((strip.shape[2] * ZOOM, height), 0)
        image.paste(picture, (label, y))
        if title:
            draw.text((14, y + height // 2 - 26), title, INK, font(20))
        draw.text((14, y + height // 2), text, FAINT if not title else INK, font(15))
    with replacing(path) as file:
        image.save(file, "PNG")


def heat_map(path: Path, names: Sequence[str], tables: Mapping[str, Mapping]) -> None:
    """One square for each method: mean crosstalk of each pair of concepts over all layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(tables), 4.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    squares = {method: pair_matrix(names, table) for method, table in tables.items()}
    top = max(float(square.fill_diagonal_(0).max()) for square in (s.clone() for s in squares.values()))
    for axes, (method, square) in zip(figure.subplots(1, len(tables), squeeze=False)[0], squares.items(), strict=True):
        shown = axes.imshow(square.fill_diagonal_(float("nan")), vmin=0, vmax=max(top, 1e-6), cmap="magma_r")
        axes.set_title(TITLES[method])
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                if row != column:
                    value = float(square[row, column])
                    dark = value > top / 2
                    axes.text(
                        column,
                        row,
                        f"{value:.3f}",
                        ha="center",
                        va="center",
                        color="white" if dark else "black",
                    )
    figure.colorbar(shown, ax=figure.axes, shrink=0.8, label="crosstalk  ‖ΔWᵢΔWⱼᵀ‖ / (‖ΔWᵢ‖‖ΔWⱼ‖)")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def pair_matrix(names: Sequence[str], table: Mapping) -> Tensor:
    """Symmetric (k, k) of mean crosstalk per pair; the diagonal is 0."""
    square = torch.zeros(len(names), len(names))
    for (first, second), value in table["pairs"].items():
        row, column = names.index(first), names.index(second)
        square[row, column] = square[column, row] = value["crosstalk"]
    return square


def report_text(report: Mapping) -> str:
    """report.md: the figures of report.json as two tables, and what they mean."""
    lines = [
        HEADING,
        "",
        "Toy results: 32-pixel pictures of a procedural world, drawn by the small base model that comes with the pack.",
        "Identity is the share of pictures that the identity judge accepts, image the mean cosine to the references,",
        "text the share of asked words (class, scene) found, mistaken the share that looks more like another concept",
        "of the three than like the one asked for.",
        "",
        "| method | concept | identity alone | merged | image alone | merged | text alone | merged | mistaken |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, figures in report["methods"].items():
        for name, each in figures["concepts"].items():
            cells = [
                each[f"{kind}_{stage}"] for kind in ("identity", "image", "text") for stage in ("single", "merged")
            ]
            row = [
                TITLES[method],
                name,
                *(f"{value:.2f}" for value in cells),
                f"{each['mistaken_merged']:.2f}",
            ]
            lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "| method | crosstalk | merge | joint picture: identity | mistaken | missing | prior drift |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for method, figures in report["methods"].items():
        joint = figures["joint"].values()
        mean = {key: sum(each[key] for each in joint) / len(joint) for key in ("identity", "mistaken", "missing")}
        drift = ", ".join(f"{word} {value:+.2f}" for word, value in figures["prior_drift"].items())
        row = [TITLES[method], f"{figures['crosstalk']:.4f}", f"{figures['merge_ms']:.1f} ms"]
        row += [f"{mean[key]:.2f}" for key in ("identity", "mistaken", "missing")] + [drift]
        lines.append("| " + " | ".join(row) + " |")
    judged = report["judges"]["accuracy"]
    recogniser, reader = judged["recogniser"], judged["reader"]
    lines += [
        "",
        "The judges on drawn pictures that they never saw: the identity judge accepts "
        f"{recogniser['true_accepts']:.1%} of",
        f"the right subjects, {recogniser['false_accepts_strangers']:.1%} of strangers of the same class and "
        f"{recogniser['false_accepts_look_alikes']:.1%} of look-alikes;",
        f"the reader names the class in {reader['class']:.1%} and the scene in {reader['scene']:.1%}.",
        "",
        f"Each figure comes from {report['settings']['pictures_per_figure']} pictures, those of the joint picture from "
        f"{report['settings']['joint_pictures']},",
        f"in which each concept has a third; the run took {report['seconds']:.0f} seconds.",
        "",
    ]
    return "\n".join(lines)
