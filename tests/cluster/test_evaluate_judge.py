"""An evaluation on Ray whose sets pass different networks: pictures a judge's too, training pictures CLIP's alone."""

from __future__ import annotations

from pathlib import Path

from tests.support.judge import judge_config, write_squares

from unclip.cluster.evaluate import run_evaluate
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.extractors import extract_all
from unclip.evaluation.feature_folder import features_table
from unclip.evaluation.job import EvaluationJob
from unclip.evaluation.judge.job import train_judge


def contents(folder: Path) -> dict[str, bytes]:
    names = ("attributes.parquet", "result.json", "report.html", "features/*/*")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(name)}


def without_ray(config: EvaluatePicturesConfig) -> dict[str, bytes]:
    job = EvaluationJob.prepare(config)
    job.begin()
    for name, units in job.missing().items():
        networks = job.subject.networks(name)
        for network in networks:
            network.setup("cpu")
        for unit in job.prepare_units(name, units):
            made = extract_all(networks, unit.inputs, config.microbatch)
            job.write(name, unit.number, features_table(unit.ids, unit.captions, made))
    job.finish()
    return contents(Path(config.out))


def test_two_actors_make_what_one_process_makes(tiny_clip: str, tmp_path: Path) -> None:
    drawn, real, trained = (
        write_squares(tmp_path / name, range(count), seed=seed)
        for seed, (name, count) in enumerate({"drawn": 130, "real": 70, "trained": 200}.items())
    )
    train_judge(judge_config(trained, tmp_path / "judge", steps=1))
    config = EvaluatePicturesConfig.from_dict(
        {
            "pictures": drawn,
            "reference": real,
            "training": trained,
            "judge": str(tmp_path / "judge"),
            "clip": tiny_clip,
            "kid_subsets": 2,
            "resamples": 100,
        }
    )
    result = run_evaluate(config.merged({"out": str(tmp_path / "ray"), "actors": 2}))
    assert {"attribute_all", "training"} <= result["metrics"].keys()
    assert contents(tmp_path / "ray") == without_ray(config.merged({"out": str(tmp_path / "alone")}))
