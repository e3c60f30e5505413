"""The public face: what `import modular_concepts as mc` gives, and the examples of docs/api.md, run in a row."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from laws import seeded
from untrained_toy import filled_concept, write_untrained

import modular_concepts as mc
from modular_concepts.files.concept import save_concept
from modular_concepts.pictures import to_image
from modular_concepts.toy import model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, modular_concepts as mc; mc.__all__; print(sorted({'torch', 'numpy', 'einops'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_on_the_page():
    for name in mc.__all__:
        assert getattr(mc, name) is not None
        assert name == "__version__" or f"`{name}" in PAGE or f"mc.{name}" in PAGE, name
    assert set(mc.__all__) <= set(dir(mc))
    with pytest.raises(AttributeError, match="no attribute 'load_lora'"):
        mc.load_lora  # noqa: B018 - looking is what loads


def test_every_public_function_says_what_it_does():
    for name in mc.__all__:
        if callable(getattr(mc, name)):
            assert (getattr(mc, name).__doc__ or "").strip(), name


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(model, "WEIGHTS", write_untrained(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    import torch

    for number in range(2):
        to_image(torch.rand(3, 32, 32, generator=seeded(number))).save(f"pictures/{number}.png")
    save_concept(filled_concept("tom", 1), "tom.safetensors")
    assert len(EXAMPLES) == 7
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(ast.parse(example), "docs/api.md", "exec"), names)  # noqa: S102 - our own page
    assert "crosstalk" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.safetensors")} >= {"minka.safetensors", "both.safetensors"}
