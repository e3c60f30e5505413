"""A checkpoint that nobody vouches for is the whole state of a run or one sentence, before anything is built of it."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_problem import EVERYTHING, RESUME_SETTINGS, learned, problem_with_everything, tiny_basis
from tiny_problem import tiny_problem as make_problem

from modular_concepts.errors import AdapterError
from modular_concepts.training.checkpoint import (
    _state,
    check_checkpoint,
    checkpoint_settings,
    checkpoint_step,
    newest_checkpoint,
    restore_checkpoint,
)
from modular_concepts.training.checkpoint_checks import check_state
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.run import Run

UP = "adapters.unet.to_q.lora_up"
MOMENT, SQUARE, COUNT = (f"optimizer.{UP}.{part}" for part in ("exp_avg", "exp_avg_sq", "step"))
NOISE, ORDER = "generators.noise", "orders.examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three steps with every option, fp16's loss scale among them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    train(
        problem_with_everything(), EVERYTHING, Listeners(lambda at: at.step == 3), Keeping(folder), basis=tiny_basis()
    )
    return newest_checkpoint(folder)


def read(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


@pytest.fixture(scope="module")
def resume():
    """Brings one fresh run to a checkpoint's state; what is refused leaves it fresh."""
    run = Run(problem_with_everything(), EVERYTHING, tiny_basis())
    before = {name: tensor.detach().clone() for name, tensor in run.parameters().items()}
    yield lambda path, **options: restore_checkpoint(path, run, **options)
    assert run.step == 0 and not run.losses and not run.optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.parameters().items())


def twisted(state, offset, form, value):
    raw = bytearray(state.numpy().tobytes())
    struct.pack_into(form, raw, offset, value)
    return torch.frombuffer(raw, dtype=torch.uint8)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


TENSORS = {  # what is done to the tensors -> what the sentence names
    "moment of another shape": (lambda t: t | {MOMENT: torch.zeros(1)}, MOMENT.rpartition(".")[2]),
    "moment turned": (lambda t: t | {MOMENT: t[MOMENT].mT.contiguous()}, "exp_avg of adapters"),
    "moment of another type": (lambda t: t | {MOMENT: t[MOMENT].half()}, "exp_avg of adapters"),
    "squares below zero": (lambda t: t | {SQUARE: t[SQUARE] - 1}, "negative"),
    "moment missing": (lambda t: without(t, MOMENT), "lacks exp_avg"),
    "factor that no weight survives": (lambda t: t | {UP: t[UP] + 1e13}, "no training survives"),
    "word that no encoder survives": (lambda t: t | {"tokens.<x>": t["tokens.<x>"] - 1e13}, "no training survives"),
    "moment that no weight survives": (lambda t: t | {MOMENT: t[MOMENT] + 3e38}, "no training survives"),
    "moment of other squares": (lambda t: t | {MOMENT: t[MOMENT] + 1e3}, "larger than its exp_avg_sq"),
    "moment without its squares": (lambda t: t | {SQUARE: t[SQUARE] * 0}, "larger than its exp_avg_sq"),
    "moments before the first step": (lambda t: t | {COUNT: torch.tensor(0.0)}, "after 0 steps"),
    "moment too many": (lambda t: t | {f"optimizer.{UP}.momentum": torch.zeros(1)}, "strange momentum"),
    "state of no parameter": (lambda t: t | {"optimizer.adapters.unet.x.lora_up.step": torch.zeros(())}, "belongs to"),
    "state without parameter": (lambda t: t | {"optimizer.exp_avg": torch.zeros(2)}, "belongs to"),
    "step of a shape": (lambda t: t | {COUNT: torch.zeros(2)}, "step of adapters"),
    "step ahead of the losses": (lambda t: t | {COUNT: torch.tensor(9.0)}, "is 9.0, of 3 steps"),
    "half a step": (lambda t: t | {COUNT: torch.tensor(1.5)}, "is 1.5"),
    "step below zero": (lambda t: t | {COUNT: torch.tensor(-1.0)}, "is -1.0"),
    "step as a whole number": (lambda t: t | {COUNT: torch.tensor(3)}, "step of adapters"),
    "factor of whole numbers": (lambda t: t | {UP: t[UP].long()}, UP),
    "factor in half precision": (lambda t: t | {UP: t[UP].half()}, UP),
    "losses missing": (lambda t: without(t, "losses"), "losses"),
    "losses of other length": (lambda t: t | {"losses": t["losses"][:2]}, "losses"),
    "losses in a square": (lambda t: t | {"losses": t["losses"][:, None]}, "losses"),
    "losses in single precision": (lambda t: t | {"losses": t["losses"].float()}, "losses"),
    "losses below zero": (lambda t: t | {"losses": t["losses"] - 99}, "never below 0"),
    "generator of zeros": (
        lambda t: t | {NOISE: torch.cat([t[NOISE][:24], torch.zeros(8 * 624).byte(), t[NOISE][24 + 8 * 624 :]])},
        "that a generator can be in",
    ),
    "generator of long words": (
        lambda t: t | {NOISE: twisted(t[NOISE], 24, "=Q", 2**40)},
        "that a generator can be in",
    ),
    "generator missing": (lambda t: without(t, "generators.flip"), "generators.flip is missing"),
    "generator too short": (lambda t: t | {NOISE: t[NOISE][:-1].clone()}, "state of a generator"),
    "generator too long": (lambda t: t | {NOISE: torch.cat([t[NOISE], t[NOISE]])}, "state of a generator"),
    "generator of floats": (lambda t: t | {NOISE: t[NOISE].float()}, "state of a generator"),
    "generator without seed": (lambda t: t | {NOISE: twisted(t[NOISE], 12, "=i", 0)}, "that a generator can be in"),
    "generator beyond its end": (lambda t: t | {NOISE: twisted(t[NOISE], 16, "=Q", 624)}, "that a generator can be in"),
    "generator with time left": (lambda t: t | {NOISE: twisted(t[NOISE], 8, "=i", 624)}, "that a generator can be in"),
    "generator's next number": (lambda t: t | {NOISE: twisted(t[NOISE], 5048, "=f", 1e30)}, "a generator can be in"),
    "generator's next pair": (
        lambda t: t | {NOISE: twisted(t[NOISE], 5016, "=d", float("nan"))},
        "that a generator can be in",
    ),
    "unknown generator": (lambda t: t | {"generators.other": t[NOISE].clone()}, "belongs to nothing"),
    "order missing": (lambda t: without(t, ORDER), "orders.examples is missing"),
    "order of floats": (lambda t: t | {ORDER: torch.zeros(2)}, "list of pictures"),
    "order in a square": (lambda t: t | {ORDER: torch.zeros(2, 2, dtype=torch.int64)}, "list of pictures"),
    "order below zero": (lambda t: t | {ORDER: torch.tensor([-1])}, "list of pictures"),
    "order beyond the pictures": (lambda t: t | {ORDER: torch.tensor([99])}, "pictures that there are not"),
    "order of one picture": (lambda t: t | {ORDER: torch.full((900,), int(t[ORDER][0]))}, "more often than it comes"),
    "order without end": (lambda t: t | {ORDER: t[ORDER].repeat(1000)}, "more often than it comes"),
    "scale missing": (lambda t: without(t, "loss_scale"), "loss_scale is missing"),
    "scale of nothing": (lambda t: t | {"loss_scale": torch.zeros(2, dtype=torch.float64)}, "power of two"),
    "scale too large": (
        lambda t: t | {"loss_scale": torch.tensor([2.0**200, 1.0], dtype=torch.float64)},
        "power of two",
    ),
    "scale alone": (lambda t: t | {"loss_scale": torch.ones(1, dtype=torch.float64)}, "two numbers"),
    "scale in single precision": (lambda t: t | {"loss_scale": torch.ones(2)}, "two numbers"),
    "not a number": (lambda t: t | {UP: t[UP] * float("nan")}, "NaN or infinity"),
    "endless moment": (lambda t: t | {SQUARE: t[SQUARE] + float("inf")}, "NaN or infinity"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_a_tensor_that_the_run_could_not_have_written_is_one_sentence(checkpoint, resume, tmp_path, change):
    edit, words = TENSORS[change]
    tensors, metadata = read(checkpoint)
    path = tmp_path / checkpoint.name
    save_file(edit(tensors), path, metadata)
    with pytest.raises(AdapterError, match=words) as caught:
        resume(path)
    said = str(caught.value)
    assert said.startswith(path.name) and "\n" not in said
    assert "older one, or start the training anew" in said


def with_identity(edit):
    def change(metadata):
        identity = json.loads(metadata["identity"])
        edit(identity)
        return metadata | {"identity": json.dumps(identity)}

    return change


METADATA = {
    "no step": lambda m: {k: v for k, v in m.items() if k != "step"},
    "step in words": lambda m: m | {"step": "three"},
    "step of another script": lambda m: m | {"step": "\u0663"},
    "step below zero": lambda m: m | {"step": "-3"},
    "step of many digits": lambda m: m | {"step": "9" * 5000},
    "no identity": lambda m: {k: v for k, v in m.items() if k != "identity"},
    "identity that is no JSON": lambda m: m | {"identity": "{"},
    "identity of nesting": lambda m: m | {"identity": "[" * 100_000},
    "identity of a number": lambda m: m | {"identity": "7"},
    "identity without settings": with_identity(lambda i: i.pop("settings")),
    "settings of a list": with_identity(lambda i: i.update(settings=[1])),
    "a setting of lists": with_identity(lambda i: i["settings"].update(rank=[1])),
    "a setting over two lines": with_identity(lambda i: i["settings"].update(name="a\nb")),
    "a setting of a strange name": with_identity(lambda i: i["settings"].update({"a\nb": 1})),
    "a setting of many digits": with_identity(lambda i: i["settings"].update(seed=10**300)),
    "no base": with_identity(lambda i: i.pop("base")),
    "base of a number": with_identity(lambda i: i.update(base=3)),
    "no frozen factors": with_identity(lambda i: i.pop("frozen")),
}


@pytest.mark.parametrize("change", METADATA)
def test_a_broken_description_is_one_sentence_to_everyone_who_reads_it(checkpoint, resume, tmp_path, change):
    tensors, metadata = read(checkpoint)
    path = tmp_path / checkpoint.name
    save_file(tensors, path, METADATA[change](metadata))
    for reader in (check_checkpoint, checkpoint_settings, checkpoint_step, resume):
        with pytest.raises(AdapterError, match="older one, or start the training anew") as caught:
            reader(path)
        assert str(caught.value).startswith(path.name) and len(str(caught.value)) < 400


def test_bytes_that_are_no_checkpoint_are_one_sentence(checkpoint, resume, tmp_path):
    sound = checkpoint.read_bytes()
    path = tmp_path / checkpoint.name
    for data in (b"", sound[:9], sound[:2000], sound + b"x", b"x" * 5000, sound[:8] + b"[" * (len(sound) - 8)):
        path.write_bytes(data)
        with pytest.raises(AdapterError, match="older one, or start the training anew"):
            resume(path)
    save_file({"losses": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(AdapterError, match="is not a checkpoint of a training"):
        resume(path)


def test_options_that_are_off_now_may_have_left_their_state(checkpoint):
    plain = replace(EVERYTHING, steps=4, flip=False, shuffle_tags=False, caption_dropout=0.0, precision="fp32")
    problem = replace(problem_with_everything(), prior=None)
    result = train(problem, plain, keeping=Keeping(resume=checkpoint, accept_changes=True), basis=tiny_basis())
    assert result.step == 4


def test_another_optimizer_is_refused_whatever_is_accepted(checkpoint, resume, tmp_path):
    tensors, metadata = read(checkpoint)
    path = tmp_path / checkpoint.name
    save_file(tensors, path, with_identity(lambda i: i["settings"].update(optimizer="adamw8bit"))(metadata))
    with pytest.raises(AdapterError, match="optimizer 'adamw8bit', from whose state adamw cannot go on"):
        resume(path, accept_changes=True)


def test_words_whose_names_begin_alike_keep_their_own_state(tmp_path):
    base = make_problem()
    row = base.triggers["<x>"]
    problem = replace(base, triggers={"<x>": row, "<x>.step": row, "<a/b..c>": row})
    settings = replace(RESUME_SETTINGS, steps=4)
    straight = train(problem, settings, basis=tiny_basis())
    train(problem, settings, Listeners(lambda at: at.step == 2), Keeping(tmp_path), basis=tiny_basis())
    resumed = train(problem, settings, keeping=Keeping(resume=tmp_path), basis=tiny_basis())
    assert all(torch.equal(tensor, learned(resumed)[name]) for name, tensor in learned(straight).items())


def test_eight_bit_moments_are_checked_as_well(tmp_path):
    pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng(devices=[]):
        problem = replace(make_problem(), layers={"unet.wide": torch.nn.Linear(8, 8192)})
    run = Run(problem, replace(RESUME_SETTINGS, optimizer="adamw8bit"), tiny_basis())
    up = "optimizer.adapters.unet.wide.lora_up."
    for parameter in run.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.record(1.0)
    sound = _state(run)
    check_state(sound, 1, run, changed=False)
    for part, wrong in {
        "state1": torch.zeros(1, dtype=torch.uint8),
        "state2": sound[up + "state2"].float(),
        "absmax1": torch.zeros(1),
        "absmax2": -torch.ones_like(sound[up + "absmax2"]),
        "qmap1": torch.zeros(256),
        "step": torch.tensor(7),
    }.items():
        with pytest.raises(AdapterError, match=part):
            check_state(sound | {up + part: wrong}, 1, run, changed=False)
