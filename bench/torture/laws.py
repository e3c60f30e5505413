"""The laws that `make test` holds, with many seeds, and the tests in the real host: counted promise by promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a test says when its numbers show less than the effect that it asks for.
TOO_SMALL = re.compile(r"assert [\d.e-]+ > 0\.0?\d+$")

# promise -> the tests that are its laws, by file and by a pattern of their names.
LAWS: dict[int, dict[str, str]] = {
    3: {
        "engine/test_adapters.py": "merged_equals_bypass|strength_0_and_a_new",
        "engine/test_merge.py": "sum_of_deltas",
        "engine/test_method_laws.py": "merged_and_bypassed",
        "engine/test_merge_methods.py": "method_is_its_formula|adding_to_a_weight|strength_zero",
    },
    4: {
        "engine/test_customisation.py": "leaves_the_base|leave_the_base|strength_0",
        "engine/test_training.py": "base_is_as_before|frozen_restores",
        "engine/test_regions.py": "processors_back",
        "engine/test_gated_regions.py": "base_is_as_it_was",
        "engine/test_layerwise.py": "base_is_as_before",
        "engine/test_frozen.py": "forwards_come_back|end_with_their_blocks",
        "engine/test_tokens.py": "vocabulary_is_as_before|hooks_leave",
        "engine/test_methods_reference.py": "stay_as_they_are",
    },
    5: {
        "engine/test_bases.py": "orthogonal|orthonormal|other_columns|same_bits",
        "engine/test_crosstalk.py": "no_crosstalk|disjoint|does_not_answer",
        "engine/test_method_laws.py": "own_directions|own_rows",
        "engine/test_training.py": "exactly_the_trainable",
        "engine/test_merge_methods.py": "orthogonal_concepts_pass|orthogonalising_makes",
    },
    6: {
        "engine/test_merge.py": "order|any_number|strength_0|mean_divides|side_by_side|merged_again|"
        "add_up_to_one|in_the_room",
        "engine/test_method_laws.py": "order_of_concepts|any_number|strength_0|exported_merge",
        "engine/test_merge_methods.py": "density_one|dare_keeps",
    },
    7: {
        "files/test_merges_in_diffusers.py": "",
        "files/test_stock_files.py": "",
        "files/test_lora_files.py": "",
    },
    9: {
        "engine/test_training.py": "planted|right_gradient|tokens_learn|class_pictures_weigh",
        "engine/test_methods_reference.py": "references|planted|slopes|learn_at_a_rate",
        "engine/test_adapters.py": "gradients|training_moves",
        "engine/test_reference.py": "",
        "engine/test_frozen.py": "gradcheck|plain_autograd",
        "engine/test_tokens.py": "gradients_reach",
    },
    10: {
        "engine/test_regions.py": "full_region|any_masks|order|draws_nothing|outside_its_mask|shared_out|"
        "share_every|divided",
        "engine/test_gated_regions.py": "full_region|cover_everything|order|of_their_own|own_tokens|leaves_each_layer|"
        "masks_the_positions|merged_mode",
        "engine/test_layerwise.py": "full_region|own_layers",
    },
}
HOST_LAWS: dict[int, dict[str, str]] = {
    2: {"host/test_golden_files.py": ""},
    3: {
        "host/test_patching.py": "engines_delta|bypass_computes",
        "host/test_merge_methods_in_host.py": "engines_delta|bypass_computes|smaller_dtype",
        "host/test_exactness_in_host.py": "take_a_merge|round_a_merge",
    },
    4: {
        "host/test_patching.py": "untouched",
        "host/test_exactness_in_host.py": "untouched",
        "host/test_interop_in_host.py": "untouched",
        "host/test_merge_methods_in_host.py": "untouched",
        "host/test_regions_in_host.py": "as_it_was",
        "host/test_gated_regions_in_host.py": "as_it_was",
        "host/test_toy_base.py": "as_it_was",
        "host/test_training_in_host.py": "as_it_was",
    },
    7: {
        "host/test_interop_in_host.py": "any_program|same_as_its_file|both_strengths|core_loads|without_a_place|"
        "cores_node",
        "host/test_patching.py": "stock_loader",
        "host/test_merge_methods_in_host.py": "stock_loader",
        "host/test_exactness_in_host.py": "saved_by_cores",
    },
    8: {"host/test_stopped_training.py": "", "host/test_training_in_host.py": "resuming_is_exact"},
    10: {
        "host/test_regions_in_host.py": "last_bit|any_order|headless",
        "host/test_gated_regions_in_host.py": "plain_sampling|order|headless",
    },
    11: {
        "host/test_workflows.py": "",
        "host/test_bad_input.py": "",
        "host/test_node_schemas.py": "",
        "host/test_floor.py": "",
        "host/test_toy_base.py": "",
        "host/test_training_in_host.py": "gives_the_headless|loss_falls",
    },
}


def tested(
    paths: Sequence[str], flags: Sequence[str] = (), python: Path | str = sys.executable, **environment: str
) -> list[dict]:
    """Run tests in a process of their own; what bench.torture.recording wrote of each."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [str(python), "-m", "pytest", *(str(ROOT / "tests" / path) for path in paths), "-q"]
        command += ["-p", "bench.torture.recording", "--recording", str(record), "-p", "no:cacheprovider", *flags]
        command += ["-o", "enable_assertion_pass_hook=true", "-c", str(ROOT / "tests" / "pytest.ini")]
        # Modules that are compiled without that hook would compare in silence, so these have a place of their own.
        compiled = {"PYTHONPYCACHEPREFIX": str(ROOT / "bench_output" / "torture" / "compiled")}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **compiled, **environment}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)  # noqa: S603 - our own command
        if not record.exists():
            raise RuntimeError(f"no test was run: {done.stdout[-700:]} {done.stderr[-300:]}")
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def files_of(laws: dict[int, dict[str, str]]) -> list[str]:
    return sorted({path for patterns in laws.values() for path in patterns})


def speaks_for(promise: int, test: str, laws: dict[int, dict[str, str]]) -> bool:
    path, _, name = test.partition("::")
    pattern = laws[promise].get(path)
    return pattern is not None and bool(re.search(pattern, name.partition("[")[0]))


def counted(records: Iterable[dict], laws: dict[int, dict[str, str]]) -> dict[str, dict]:
    """Promise -> {"held", "failed": what, "weak": what, "skipped", "compared": {bound: [how many, largest]}}.

    weak: tests whose numbers had too small an effect to prove anything, which every law checks too.
    """
    records, tallies = list(records), {}
    for promise in laws:
        own = [record for record in records if speaks_for(promise, record["test"], laws)]
        tally = {"held": 0, "failed": [], "weak": [], "skipped": 0, "compared": {}}
        for record in own:
            add(tally, record)
        tallies[str(promise)] = tally
    return tallies


def add(tally: dict, record: dict) -> None:
    """One test's record into a promise's tally."""
    for bound, (count, largest) in record["compared"].items():
        before, most = tally["compared"].get(bound, (0, 0.0))
        tally["compared"][bound] = [before + count, max(most, largest)]
    if record["outcome"] == "passed":
        tally["held"] += 1
    elif record["outcome"] == "skipped":
        tally["skipped"] += 1
    else:
        fault = re.search(r"^E +(.*)$", record.get("text", ""), re.MULTILINE)
        said = f"{record['test']}: {fault[1] if fault else record.get('text', '')[-200:]}"
        tally["weak" if TOO_SMALL.search(said) else "failed"].append(said[:300])


def laws_with(seed: int, one_in: int) -> dict:
    """Every law of the engine and the files once, all numbers drawn from other seeds."""
    records = tested(files_of(LAWS), ["--one-in", str(one_in)], MODULAR_CONCEPTS_SEED=str(seed))
    return {"seed": seed, "tests": len(records), "laws": counted(records, LAWS)}


def laws_in_host(path: Path, python: Path, files: Sequence[str] = ()) -> dict:
    """The laws that are tried in the real host, on one of its versions."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from finding import Host
    from run import prepared

    way = os.pathsep.join([str(ROOT), str(prepared(Host(path, python)))])
    environment = {"COMFYUI_PATH": str(path), "COMFYUI_PYTHON": str(python), "PYTHONPATH": way}
    records = tested(files or files_of(HOST_LAWS), (), python, **environment)
    failures = [record["test"] for record in records if record["outcome"] == "failed"]
    return {"tests": len(records), "failures": len(failures), "failed": failures, "laws": counted(records, HOST_LAWS)}
