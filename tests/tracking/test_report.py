"""The page from made-up run folders: complete, valid, escaped, self-contained, and the same when made again."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from framework.core.errors import DataError, UsageError
from framework.tracking.folder import RunFolder
from framework.tracking.lineage import lay_out
from framework.tracking.report import read_stage, write_report

EVIL = "<script>alert('x')</script><img src=x onerror=y>\"'&"
VOID = {"meta", "br", "img", "line", "path", "circle", "rect", "link", "input", "hr"}

ROLLOUT: dict[str, Any] = {
    "tokens": ["<|user|>", "春", "風", EVIL, "<|end|>"],
    "response_mask": [False, False, True, True, True],
    "log_probs": [0, 0, -1.25, -0.5, -0.1],
    "reference_log_probs": [0, 0, -1.0, -0.75, -0.1],
    "kl": [0, 0, -0.25, 0.25, 0],
    "rewards": [0, 0, 0.02, -0.02, 1.875],
    "values": [0, 0, 0.5, 0.75, 1.0],
    "advantages": [9, 9, 0.5, -1.0, 0.25],
    "score": 1.875,
    "step": 25,
}


class Outline(HTMLParser):
    """Tags that close in order, the text outside <style>, and every attribute."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> without a start"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def make(root: Path, stage: str, parents: dict[str, str], summary: dict[str, Any] | None, **recipe: Any) -> Path:
    run = RunFolder.open(root / stage, {"stage": stage, "seed": 7, **recipe}, parents)
    for step in range(1, 11):
        run.log(step, {"train/loss": 4 / step, "train/odd": float("nan") if step == 3 else 1.0, "own/figure": step})
    run.log(10, {"valid/loss": 0.5})
    if summary is not None:
        run.finish(summary)
    return root / stage


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    learned = [
        {"what": "held-out loss", "before": 4.25, "after": 1.5},
        {"what": "verses", "before": "0 %", "after": "93 %"},
    ]
    pretrain = make(tmp_path, "pretrain", {}, {"stage": "pretrain", "figures": {}, "learned": learned})
    sft = make(tmp_path, "sft", {"init_from": "feedface00000000"},
               {"stage": "sft", "figures": {"valid/loss": 2.0, "valid/loss/before": 3.0}},
               init_from=str(pretrain / "model"))  # fmt: skip
    ppo = make(tmp_path, "ppo", {"init_from": "cafe", "reward_from": "beef"}, None,
               init_from=f"{sft}/model", reward_from="somewhere/else")  # fmt: skip
    (sft / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [
        {"step": 0, "prompt": EVIL, "response": "before<b>", "score": -0.5},
        {"step": 10, "prompt": EVIL, "response": EVIL, "score": 1.5},
        {"step": 10, "prompt": "only once", "response": ""},
    ]))  # fmt: skip
    (ppo / "rollout.json").write_text(json.dumps(ROLLOUT))
    checkpoint = ppo / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 10, "metrics": {"m": 0.25}, "sha256": "ab" * 32}))
    return [pretrain, sft, ppo]


def test_it_holds_all_pieces(tmp_path: Path, runs: list[Path]) -> None:
    path = write_report(tmp_path / "out" / "report.html", runs, title="quick & start")
    page = outline(path)
    text = page.text
    for piece in [
        "quick & start", "3 stages", "seed 7",  # what it is
        "held-out loss 4.25 → 1.5", "verses 0 % → 93 %", "valid/loss 3 → 2", "ppo running no figures yet",  # the table
        "before<b>", "score -0.50", "score 1.50", "only once", "(nothing)",  # samples
        "1.875", "Iteration 25", "-1.250", "-0.750", "0.250", "0.500", "-1.000",  # the rollout
        "made from", "init_from pretrain feedface00000000", "reward_from somewhere/else beef",  # the lineage
        "step 10 abababababab m 0.25", "torch",
    ]:  # fmt: skip
        assert piece in text, piece
    assert text.count("train 0.4 valid 0.5") == 3
    assert page.tags.count("svg") == 3 * 3 + 1


def test_it_needs_no_network_and_runs_no_code(tmp_path: Path, runs: list[Path]) -> None:
    path = write_report(tmp_path / "report.html", runs)
    page = outline(path)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", path.read_text(encoding="utf-8"))
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert EVIL in page.text


def test_only_counting_tokens_are_coloured_and_by_their_share(tmp_path: Path, runs: list[Path]) -> None:
    stage = read_stage(runs[2], {runs[2]: "ppo"})
    assert stage.rollout is not None
    assert [token.share for token in stage.rollout.tokens] == [0, 0, 0.5, -1, 0.25]
    assert [(row.place, row.text) for row in stage.rollout.rows][:2] == [("0–1", "<|user|>春"), ("2", "風")]
    html = write_report(tmp_path / "report.html", runs).read_text(encoding="utf-8")
    classes = re.findall(r'<span class="(plus|minus|outside)" style="--a:([\d.]+)%', html)
    assert classes == [("outside", "0.0"), ("outside", "0.0"), ("plus", "39.0"), ("minus", "78.0"), ("plus", "19.5")]


def test_made_again_it_is_the_same(tmp_path: Path, runs: list[Path]) -> None:
    first = write_report(tmp_path / "report.html", runs).read_bytes()
    assert write_report(tmp_path / "report.html", runs).read_bytes() == first


def test_torn_and_empty_files_do_not_hinder_it(tmp_path: Path, runs: list[Path]) -> None:
    for run in runs:
        (run / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n[]\n{"no": "step"}\n{"step": 2, "a"')
        (run / "samples.jsonl").write_text("")
        (run / "summary.json").write_text("{")
    (runs[0] / "config.yaml").unlink()
    outline(write_report(tmp_path / "report.html", runs))


def test_a_folder_that_is_no_run_is_left_out_and_none_at_all_is_an_error(tmp_path: Path, runs: list[Path]) -> None:
    (tmp_path / "empty").mkdir()
    path = write_report(tmp_path / "report.html", [tmp_path / "empty", runs[0]])
    assert "1 stage," in outline(path).text
    with pytest.raises(UsageError, match="no run folder among"):
        write_report(tmp_path / "report.html", [tmp_path / "empty"])


@pytest.mark.parametrize(
    ("change", "text"),
    [({"kl": [0.0]}, "'kl' has 1 entries for 5 tokens"), ({"tokens": []}, "0 tokens"),
     ({"values": [None] * 5}, "'values' must hold numbers")],
)  # fmt: skip
def test_a_rollout_that_does_not_fit_is_named(runs: list[Path], change: dict[str, Any], text: str) -> None:
    (runs[2] / "rollout.json").write_text(json.dumps(ROLLOUT | change))
    with pytest.raises(DataError, match=text) as caught:
        read_stage(runs[2], {runs[2]: "ppo"})
    assert "rollout.json" in str(caught.value)


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, "sft", {}, {"figures": {"a": 1.0}}) for name in ("one", "two")]
    text = outline(write_report(tmp_path / "report.html", folders)).text
    assert str(folders[0]) in text
    assert str(folders[1]) in text


def test_the_lineage_by_hand() -> None:
    found = lay_out(["a", "b", "c", "d"], {"b": ["a"], "c": ["b"], "d": ["b", "c"]}, {"a": "note"})
    assert [(node.name, node.x) for node in found.nodes] == [("a", 0), ("b", 206), ("c", 412), ("d", 618)]
    assert found.nodes[0].note == "note"
    assert found.edges[0] == "M150 25.0 C180.8 25.0 175.2 25.0 201 25.0"
    assert len(found.edges) == 4
    assert sum("90" in edge for edge in found.edges) == 1  # b -> d bows underneath c
    side = lay_out(["a", "b"], {}, {})
    assert [(node.x, node.y) for node in side.nodes] == [(0, 0), (0, 66)]
