import argparse

import pytest

from gen_accel.cli import options
from gen_accel.cli.options import Parser, UsageError, dotted, nearest, resolve

SECTIONS = ("processor", "pipeline")


def parse(*words, sections=SECTIONS):
    parser = Parser(prog="gen-accel test")
    options.add(parser, *options.OPTIONS)
    parser.add_argument("--compare", action="store_true", default=argparse.SUPPRESS)
    parser.add_argument("--processor", default=argparse.SUPPRESS)
    given, extra = parser.parse_known_args(list(words))
    return resolve(parser, given, extra, sections)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return f"--config={path}"

    return write


def test_flags_are_those_of_diffusers():
    args = parse("--num-inference-steps", "7", "--guidance-scale", "4.5", "--num-frames", "17")
    assert (args.num_inference_steps, args.guidance_scale, args.num_frames) == (7, 4.5, 17)
    assert not hasattr(args, "height"), "what was not given has no value"


@pytest.mark.parametrize(
    "words",
    [
        ("--processor.density", "0.2"),
        ("--processor.density=0.2",),
        ("processor.density=0.2",),
        ("--processor.density=0.9", "processor.density=0.2"),
    ],
)
def test_dotted_overrides(words):
    assert parse(*words).sections == {"processor": {"density": 0.2}, "pipeline": {}}


def test_dotted_values_are_yaml():
    args = parse("processor.block=null", "--processor.dense-layers=[0, -1]", "pipeline.x=a b")
    assert args.sections == {
        "processor": {"block": None, "dense_layers": [0, -1]},
        "pipeline": {"x": "a b"},
    }


def test_file_then_flags_then_dotted(config):
    file = config(
        "model: here\nheight: 64\nnum-frames: 9\ncompare: true\nprompt: [one, two]\n"
        "processor:\n  density: 0.5\n  block: 32\n"
    )
    args = parse(file, "--height", "32", "processor.density=0.25")
    assert (args.model, args.height, args.num_frames, args.compare) == ("here", 32, 9, True)
    assert args.prompt == ["one", "two"]
    assert args.sections["processor"] == {"density": 0.25, "block": 32}


def test_a_flag_replaces_the_prompts_of_the_file(config):
    assert parse(config("prompt: [one, two]"), "--prompt", "three").prompt == ["three"]
    args = parse(config("prompts: list.txt"), "--prompt", "three")
    assert args.prompt == ["three"] and not hasattr(args, "prompts")


def test_values_of_the_file_are_checked_like_flags(config):
    with pytest.raises(UsageError, match=r"run.yaml: .*--height.*'tall'"):
        parse(config("height: tall"))
    with pytest.raises(UsageError, match=r"--dtype.*'float8'"):
        parse(config("dtype: float8"))
    assert parse(config("negative_prompt: -5 degrees")).negative_prompt == "-5 degrees"
    assert not hasattr(parse(config("compare: false\nseed:")), "compare")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--heigth", "64"), r"--heigth; did you mean --height\?"),
        (("--num_frames", "64"), r"did you mean --num-frames\?"),
        (("--num-inference-step=3",), r"did you mean --num-inference-steps\?"),
        (("--zzz",), "choose from .*--compare.*--width"),
        (("stray",), "'stray'.*section.name=value"),
        (("--procesor.density=1",), r"procesor.density; did you mean processor\?"),
        (("--processor.density",), "has no value"),
        (("--height", "x"), "--height.*'x'.*see gen-accel test --help"),
    ],
)
def test_what_is_unknown_names_the_nearest(words, message):
    with pytest.raises(UsageError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heigth: 3", r"unknown key 'heigth'; did you mean height\?"),
        ("procesor: {density: 1}", r"did you mean processor\?"),
        ("[1, 2]", "expected names and values"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_bad_files(config, text, message):
    with pytest.raises(UsageError, match=message):
        parse(config(text))


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml: cannot be read"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n")
    assert options.prompts(parse("--prompts", str(file))) == ["a cat", "a dog"]
    assert options.prompts(parse("--prompt", "x", "--prompt", "y")) == ["x", "y"]
    file.write_text("\n\n")
    with pytest.raises(UsageError, match="no prompts in it"):
        options.prompts(parse("--prompts", str(file)))
    with pytest.raises(UsageError, match="cannot be read"):
        options.prompts(parse("--prompts", str(tmp_path)))
    with pytest.raises(UsageError, match="no prompt; give --prompt"):
        options.prompts(parse())
    with pytest.raises(UsageError, match="empty prompt"):
        options.prompts(parse("--prompt", " "))


def test_nearest():
    assert nearest("densty", ["density", "block"]) == "did you mean density?"
    assert nearest("x", ["density", "block"]) == "choose from block, density"
    assert dotted(["--a.b=c"], ["a"], []) == [("a", "b", "c")]
