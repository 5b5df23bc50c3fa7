"""The page of a sweep: its curves go through the points' own numbers, and everything that it shows is in the file."""

from __future__ import annotations

import io
import re
from itertools import product

import numpy as np
from PIL import Image

from unclip.evaluation.sweep_page import SweepPoint, figure_of, lines, numbers, sweep_page

GUIDANCE, STEPS = "decoder.guidance_scale", "decoder.num_inference_steps"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sweep() -> list[SweepPoint]:
    """Two lines of three scales: CLIP-score rises with guidance, the distance is 10 * scale + steps."""
    return [
        SweepPoint(
            {GUIDANCE: scale, STEPS: steps},
            {"clip.frechet_distance": 10 * scale + steps, "clip.recall": 1 / scale, "clip_score.mean": scale / 10},
            {"a cat": png(int(scale)), "a dog": png(steps)},
        )
        for scale, steps in product((4.0, 1.0, 2.0), (15, 5))
    ]


def test_numbers_are_those_of_the_metrics_by_dotted_names() -> None:
    metrics = {"clip": {"cmmd": 0.5, "note": "text", "is": True}, "clip_score": {"mean": 1}, "inception": None}
    assert numbers(metrics) == {"clip.cmmd": 0.5, "clip_score.mean": 1}


def test_a_line_goes_along_an_axis_for_each_value_of_the_others() -> None:
    drawn = lines(sweep(), "clip_score.mean", "clip.frechet_distance", GUIDANCE)
    assert drawn == {
        f"{STEPS} {steps}": [(scale / 10, 10 * scale + steps, scale) for scale in (1.0, 2.0, 4.0)] for steps in (15, 5)
    }
    assert lines(sweep(), STEPS, "clip.recall", STEPS)[f"{GUIDANCE} 4"] == [(5, 0.25, 5), (15, 0.25, 15)]


def test_a_point_without_the_number_is_left_out() -> None:
    points = [*sweep(), SweepPoint({GUIDANCE: 8.0, STEPS: 5}, {"clip_score.mean": 0.9}, {})]
    assert lines(points, "clip_score.mean", "clip.frechet_distance", GUIDANCE) == lines(
        sweep(), "clip_score.mean", "clip.frechet_distance", GUIDANCE
    )


def test_the_distance_is_drawn_against_clip_score_then_each_metric_against_each_axis() -> None:
    panels = [axes for axes in figure_of(sweep()).axes if axes.get_title()]
    assert [(axes.get_xlabel(), axes.get_title()) for axes in panels] == [
        ("clip_score.mean", "clip.frechet_distance"),
        *(
            (axis, name)
            for axis in (GUIDANCE, STEPS)
            for name in ("clip.frechet_distance", "clip.recall", "clip_score.mean")
        ),
    ]
    first = {line.get_label(): line.get_xydata().tolist() for line in panels[0].lines}
    assert first[f"{STEPS} 5"] == [[0.1, 15.0], [0.2, 25.0], [0.4, 45.0]]
    assert [text.get_text() for text in panels[0].texts] == ["1", "2", "4"] * 2
    explained = [[text.get_text() for text in axes.get_legend().texts] for axes in panels if axes.get_legend()]
    assert explained == [[f"{STEPS} 15", f"{STEPS} 5"], [f"{GUIDANCE} {scale}" for scale in (4, 1, 2)]]
    recall = panels[5]
    assert sorted(line.get_xydata().tolist() for line in recall.lines) == [
        [[5.0, value], [15.0, value]] for value in (0.25, 0.5, 1.0)
    ]


def test_the_page_has_all_numbers_and_a_picture_of_each_prompt_at_each_point() -> None:
    html = sweep_page("Sweep of B", sweep()).html()
    for point in sweep():
        assert f"<th>{point.title}</th>" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert len(re.findall("<img", html)) == 1 + 2 * len(sweep())
    assert html.count("a cat") >= 1
