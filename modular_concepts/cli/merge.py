"""The commands around merging: merge by any method, inspect what concepts do to each other, export for others."""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError, listed
from ..settings.merging import ACT_ON, EXACT, HOW, LITERAL, MERGING, METHOD_HELP
from ..storage.names import safe_name
from .declared import add_option, spell_flag
from .paths import (
    add_overwrite,
    base_named,
    check_concept_output,
    check_name,
    concepts_at,
    folder,
    load_plain_concepts,
    note,
    note_repeated,
    read_file,
    read_path,
    refuse_existing,
    say,
    take_free_names,
)

if TYPE_CHECKING:
    from ..merging import Evidence, MergeOptions

FORMATS = ("kohya", "diffusers", "concept", "compact")
MOST_WORDS, LONGEST = 20, 1000  # of what inspect shows of one file
SAID = {
    "title": "the name that programs show",
    "author": "who made it",
    "description": "what it is",
    "license": "what others may do with it",
    "tags": "words to find it by, with commas between",
}


def add_merge(commands) -> None:
    methods = "\n".join(
        textwrap.fill(f"{name}: {text}", 90, initial_indent="  ", subsequent_indent="      ")
        for name, text in METHOD_HELP.items()
    )
    merge = commands.add_parser(
        "merge",
        help="several concepts into one file, by any method",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Merge concepts, or LoRAs with kohya's or diffusers' keys, into one file that stock loaders read "
        "too.\nKeys that find no place are named. A sum is exact: one LoRA whose rank is the sum of theirs, strengths\n"
        "inside; what the other methods do is said below.",
        epilog=f"methods:\n{methods}",
    )
    merge.add_argument("concepts", nargs="+", help="FILE or FILE:STRENGTH")
    merge.add_argument("--out", type=read_file, required=True, help="the concept file to write")
    add_overwrite(merge)
    add_option(merge, HOW, default=HOW.default, usual="(see below; default sum)", metavar="METHOD")
    add_option(merge, LITERAL, default=False, usual="", only=True, action="store_true")
    for setting in MERGING.values():
        add_option(merge, setting, only=True)
    add_option(merge, ACT_ON)
    add_option(merge, EXACT, default=False, usual="", only=True, action="store_true")
    merge.add_argument(
        "--moments",
        nargs="+",
        type=read_path,
        metavar="FILE",
        help="fusion: what each concept's layers read, one file for each concept (default: NAME.moments "
        "beside it, or recorded and kept there with --base)",
    )
    merge.add_argument(
        "--base",
        help="toy, or a diffusers folder: to record moments and read words with, and to say what was trained on "
        "another checkpoint",
    )
    _add_about(merge)
    merge.set_defaults(run=run_merge)


def add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what is in concept files, and the crosstalk of several",
        description="Say what is in concept files: layers, learned words, how each was made; of several also how much "
        "they disturb each other.",
    )
    inspect.add_argument(
        "concepts", nargs="+", metavar="FILE", help="concepts, or LoRAs with kohya's or diffusers' keys"
    )
    inspect.add_argument("-v", "--verbose", action="store_true", help="with the training's settings")
    inspect.set_defaults(run=run_inspect)


def add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="for other programs: kohya (ComfyUI, A1111) or diffusers / peft; or as a concept file, full or compact",
        description="Write a concept for other programs, learned words as embeddings beside it; or anew as a concept "
        "file, with its frozen factors (concept) or without (compact).",
    )
    export.add_argument("concept", help="FILE")
    export.add_argument("--format", choices=FORMATS, default="kohya", help="default kohya")
    export.add_argument(
        "--out",
        type=read_file,
        help="default exports/NAME_FORMAT.safetensors; learned words go into a folder embeddings beside it",
    )
    add_overwrite(export)
    _add_about(export)
    export.set_defaults(run=run_export)


def _add_about(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what the file says to programs that list models")
    for name, meaning in SAID.items():
        group.add_argument(f"--{name}", default="", metavar="TEXT", help=meaning)
    group.add_argument(
        "--thumbnail", type=read_path, metavar="PICTURE", help="a picture that shows it; kept small in the file"
    )


# --- merge --------------------------------------------------------------------------------------------------


def run_merge(args: argparse.Namespace) -> None:
    from ..crosstalk.report import warnings_between, warnings_on_base
    from ..files.concept import save_concept
    from ..merging import MergeOptions
    from ..merging.as_concept import check_together, merged_concept
    from ..merging.block_strengths import unfelt
    from ..merging.fusion import EXACT as LEAST_RIDGE
    from ..merging.methods import Merge
    from ..merging.own_words import as_acting, split, words_of
    from ..stack import Stack
    from ..storage.names import resolved
    from ..text.ordinary import tell_taken_words
    from ..unread import MERGE, find_unread

    check_concept_output(args.out, args.overwrite)
    name = check_name(args.out.stem, "the concept's name")
    if args.exact and args.ridge is not None:
        raise AdapterError("--exact is fusion without damping, and --ridge is the damping; give one of them")
    chosen = {name: getattr(args, name) for name in MERGING}
    chosen["ridge"] = LEAST_RIDGE if args.exact else args.ridge
    options = MergeOptions(**{name: value for name, value in chosen.items() if value is not None})
    note_repeated(args)
    about = _read_about(args)
    concepts, strengths, paths = concepts_at(args.concepts)
    if resolved(args.out) in map(resolved, paths):
        raise AdapterError(f"the merge would replace {args.out}, one of its parts; choose another --out")
    check_together(concepts)
    base = base_named(args.base) if args.base is not None else None
    act_on = args.act_on or ACT_ON.default
    acting = [as_acting(concept, act_on) for concept in concepts]
    typed = [name for name in MERGE if getattr(args, name) not in (None, False, "")]
    for sentence in [
        *find_unread(MERGE, typed, args.how, called=spell_flag),
        *split(Stack(zip(concepts, strengths, strict=True)), act_on, args.how).notes,
        *unfelt([concept.name for concept in concepts], strengths),
        *warnings_between(acting),
        *(warnings_on_base(concepts, base.hash, base.sample, base.architecture) if base else []),
        *(tell_taken_words([word for concept in concepts for word in concept.tokens], base.ordinary) if base else []),
    ]:
        note(sentence)
    evidence = _gather_evidence(args, concepts, paths, base)
    merge = Merge(args.how, args.literal, options, evidence, act_on)
    whole = merged_concept(name, concepts, strengths, merge)
    merged = _describe(about, whole)
    folder(args.out.parent)
    with take_free_names(args.overwrite):
        save_concept(merged, args.out)
    names, words = listed([concept.name for concept in concepts], 20, " + "), listed(words_of(merged), 20, " ")
    say(f"wrote {args.out}: {names}; triggers {words or 'none'}")
    if args.how == "svd":
        say(_say_kept(merged, concepts, strengths, options))
    say_crosstalk(acting)


def _gather_evidence(args: argparse.Namespace, concepts: Sequence, paths: Sequence[Path], base) -> Evidence:
    from ..merging import Evidence
    from ..merging.method import MOMENTS, TEXTS
    from ..merging.methods import METHODS

    needs = METHODS[args.how].needs
    if needs == MOMENTS:
        files = _find_moment_files(args, paths)
        moments = [_find_moments(*one, base, args.moments is not None) for one in zip(concepts, files, strict=True)]
        _check_one_base([file for file in files if file.is_file()])
        return Evidence(moments)
    if needs != TEXTS:
        return Evidence()
    if base is None:
        raise AdapterError(f"{args.how} reads the concepts' words with the base's text encoder; give --base")
    from ..recording import text_features, usual_text

    return Evidence(texts=[text_features(base, concept) for concept in concepts], usual=usual_text(base))


def _find_moment_files(args: argparse.Namespace, paths: Sequence[Path]) -> list[Path]:
    from ..files.moments import moments_path

    if args.moments is None:
        return [moments_path(path) for path in paths]
    if len(args.moments) != len(paths):
        raise AdapterError(
            f"{len(args.moments)} of {len(paths)} concepts have a file of moments; give one for each, in order"
        )
    return args.moments


def _find_moments(concept, path: Path, base, chosen: bool) -> Mapping:
    """From the file if it is of this concept and base, or drawn with the base and kept there.

    chosen: the file was named by --moments, so what is there is never replaced, and refused where it does not fit.
    """
    from ..files.moments import Recorded, load_moments, recorded_from, why_not

    there = path.is_file()
    origin = recorded_from(path) if there else Recorded()
    reason = why_not(origin, concept, base.mark if base else "") if there else ""
    if there and chosen and origin == Recorded():
        note(f"{path} {reason}; it is read as if it were with {concept.name} as it is now")
        reason = ""
    if there and not reason:
        return load_moments(path)
    if there and chosen:
        raise AdapterError(f"{path}: this file {reason}; leave --moments out and give --base to record moments anew")
    if base is None:
        problem = f"{path} {reason}" if there else f"there are no moments of what its layers read at {path}"
        raise AdapterError(f"{concept.name}: {problem}; give --base to record them, or --moments")
    if there:
        note(f"{path} {reason}; {concept.name} is drawn and recorded again")
    return _record(concept, path, base)


def _record(concept, path: Path, base) -> Mapping:
    from ..files.moments import Recorded, load_moments, save_moments
    from ..models.fingerprint import concept_mark
    from ..recording import PROMPTS, recorded

    moments = recorded(base, concept).moments()
    try:
        save_moments(moments, path, Recorded(concept_mark(concept), base.mark, str(PROMPTS)))
    except AdapterError as error:
        note(f"what the layers of {concept.name} read is used, but not kept: {error}")
        return moments
    say(f"wrote {path}: what the layers of {concept.name} read")
    # As it will be read the next time, so that both times give the same merge.
    return load_moments(path)


def _check_one_base(files: Sequence[Path]) -> None:
    """Refuse moments of two bases, where no --base says which is meant."""
    from ..files.moments import recorded_from
    from ..models.fingerprint import same_base

    marks = {file: mark for file in files if (mark := recorded_from(file).base)}
    for file, mark in marks.items():
        first = next(iter(marks))
        if not same_base(mark, marks[first]):
            raise AdapterError(
                f"{first} and {file} were recorded on two base models; give --base, the one that you draw with, to "
                "record them for it"
            )


def _say_kept(merged, concepts: Sequence, strengths: Sequence[float], options: MergeOptions) -> str:
    from ..merging import merge_concepts
    from ..merging.truncation import share_kept

    share = share_kept(merge_concepts([merged], [1.0]), merge_concepts(concepts, strengths))
    return f"rank {options.rank} keeps {share:.1%} of the sum's energy, {1 - share:.1%} is lost"


def say_crosstalk(concepts: Sequence) -> None:
    from ..crosstalk.measures import crosstalk_table

    if len(concepts) < 2:
        return
    for (first, second), figures in crosstalk_table(concepts)["pairs"].items():
        say(f"crosstalk {first} and {second}: {figures['crosstalk']:.4f}")


# --- inspect and export -------------------------------------------------------------------------------------


def run_inspect(args: argparse.Namespace) -> None:
    from ..adapters.low_rank import LowRank
    from ..crosstalk.measures import delta_norm
    from ..crosstalk.report import warnings_between
    from ..merging.as_concept import SAMPLE
    from ..merging.compatibility import trained_for_words
    from ..merging.own_words import residuals_of
    from ..models.layers import block_of
    from ..text.learned_word import layers_of
    from ..unread import INSPECT, RECORDED, find_unread

    concepts, _ = load_plain_concepts(args.concepts, "inspect")
    typed = ["verbose"] if args.verbose else []
    present = [RECORDED] if any(concept.recipe.training for concept in concepts) else []
    for sentence in find_unread(INSPECT, typed, present=present, called=lambda name: f"--{name}"):
        note(sentence)
    for path, concept in zip(args.concepts, concepts, strict=True):
        recipe = concept.recipe
        made = {key: value for key, value in recipe.to_json().items() if value not in (None, "", [], {})}
        if "origin" in made:  # numbers that say nothing to a person
            made["origin"] = {key: value for key, value in made["origin"].items() if key != SAMPLE}
        blocks = dict.fromkeys(block_of(name) for name in concept.layers)
        adapters: list[LowRank] = list(concept.layers.values())
        size = math.hypot(*map(delta_norm, adapters))
        say(f"{path}: concept {concept.name!r}")
        for key, value in concept.about.items():
            say(f"  {key}: {'a picture' if key == 'thumbnail' else _shorten(value)}")
        if adapters:
            say(f"  {len(adapters)} layers in {', '.join(blocks)}; size of the change ‖ΔW‖ = {size:.3f}")
        else:
            say("  no layers, the word alone")
        for residual in residuals_of(concept, 1.0) if trained_for_words(concept) else ():
            say(f"  acts at {' '.join(residual.triggers)} alone, and nowhere else")
        for word, rows in islice(concept.tokens.items(), MOST_WORDS):
            each = f", for each of {len(rows)} cross-attention layers" if layers_of(rows) else ""
            say(f"  learned word {word}: {rows.shape[-2]} x {rows.shape[-1]}{each}")
        if len(concept.tokens) > MOST_WORDS:
            say(f"  and {len(concept.tokens) - MOST_WORDS} more learned words")
        for key, value in made.items():
            if key != "training" or args.verbose:
                say(f"  {key}: {_shorten(_put_in_words(value))}")
    say_crosstalk(concepts)
    for sentence in warnings_between(concepts):
        note(sentence)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} letters)"


def _put_in_words(value: object) -> str:
    """A recipe's entry for a person to read, not for a program."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} {_put_in_words(part)}" for key, part in value.items() if part not in (None, "", [], {})
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(_put_in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_export(args: argparse.Namespace) -> None:
    from ..files.diffusers import export_diffusers
    from ..files.embeddings import embedding_files, export_embedding
    from ..files.kohya import EXPORTED, export_kohya
    from ..merging.compatibility import refuse_own_words
    from ..storage.atomic import all_or_none
    from ..storage.names import resolved
    from ..text.learned_word import layers_of

    (concept,), (source,) = load_plain_concepts([args.concept], "export")
    note_repeated(args)
    concept = _describe(_read_about(args), concept)
    out = args.out or Path("exports") / f"{_file_name(concept.name, source)}_{args.format}.safetensors"
    check_concept_output(out)
    if args.format in ("kohya", "diffusers"):
        refuse_own_words([concept], EXPORTED)
    source, words = resolved(source), out.parent / "embeddings"
    whole = args.format in ("concept", "compact")
    if source == resolved(out) or (source.parent == resolved(words) and not whole):
        raise AdapterError(f"the export would replace {args.concept} itself; choose another --out")
    if whole or concept.layers:
        check_concept_output(out, args.overwrite)
    if whole:
        folder(out.parent)
        with take_free_names(args.overwrite):
            _save(concept, out, args)
        say(f"wrote {out}")
        return
    files = embedding_files(concept, words)
    there = [] if args.overwrite else [path for path, word in files.items() if _has_word(concept, path, word)]
    if args.out is not None and not concept.layers:
        note(f"{concept.name} is words alone, so {out} is not written: a learned word goes into {words}")
    if concept.tokens:
        folder(words)
    folder(out.parent)
    with take_free_names(args.overwrite), all_or_none():
        # Words first: what cannot be exported at all is found before anything is written.
        for path, word in files.items():
            if path not in there:
                export_embedding(concept, word, path)
        if concept.layers:
            (export_kohya if args.format == "kohya" else export_diffusers)(concept, out)
    for path in files:
        wrote = "has the learned word already" if path in there else "the learned word, for the embeddings folder"
        say(f"{'kept' if path in there else 'wrote'} {words / path.name}: {wrote}")
    if any(map(layers_of, concept.tokens.values())):
        say("note: the word has rows for each layer, which other programs cannot use; the file has their mean")
    if concept.layers:
        say(f"wrote {out}")


def _save(concept, out: Path, args: argparse.Namespace) -> None:
    from ..files.concept import save_concept

    try:
        save_concept(concept, out, compact=args.format == "compact")
    except AdapterError as error:
        if str(error).startswith(str(out)):
            raise
        raise AdapterError(f"{args.concept}: {error}") from error


def _file_name(name: str, path: Path) -> str:
    """A concept's name as a file's, or that of its file where it has none that a file can have."""
    try:
        return safe_name(name)
    except AdapterError:
        return safe_name(path.stem)


def _has_word(concept, path: Path, word: str) -> bool:
    """Whether a file holds the very word, as after an export in another format; refuses to replace any other."""
    from ..files.embeddings import import_embedding, stock_rows

    if not os.path.lexists(path):
        return False
    try:
        same = import_embedding(path)[1].equal(stock_rows(concept.tokens[word]).float())
    except AdapterError:
        same = False
    if not same:
        refuse_existing(Path(os.path.relpath(path)))
    return True


def _read_about(args: argparse.Namespace) -> dict[str, str]:
    """What was typed for the file to say of itself, sound, before there is anything that could say it."""
    from ..concept import Concept, Recipe
    from ..files.modelspec import THUMBNAIL_SIDE, check_about, saying, thumbnail

    about = {name: getattr(args, name) for name in SAID}
    if args.thumbnail is not None:
        from ..data.dataset import FIRST_FRAME, TRANSPARENT, load_picture

        words = {
            FIRST_FRAME: "of a moving picture the first frame is shown",
            TRANSPARENT: "transparent parts are white",
        }
        picture = load_picture(
            args.thumbnail,
            4 * THUMBNAIL_SIDE,
            lambda oddity: note(f"--thumbnail {args.thumbnail}: {words.get(oddity, oddity)}"),
        )
        about["thumbnail"] = thumbnail(picture)
    check_about(saying(Concept("the file", {}, {}, Recipe()), **about))
    return about


def _describe(about: Mapping[str, str], concept):
    """The concept with what was typed about it, and a date."""
    from ..files.modelspec import check_about, dated, saying

    concept = dated(saying(concept, **about))
    check_about(concept)
    return concept
