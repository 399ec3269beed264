"""plumbing/flags.py - settings: small dataclasses whose fields are also the flags of the commands.

    @dataclass
    class Decoding(Settings):
        temperature: float = setting(1.0, "T; 0 is greedy", low=0)

`make_parser` makes --temperature of it, and `read_flags` makes a Decoding of parsed flags. So the default,
the bounds and the help of a setting are written once. This file imports nothing of the project.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import sys


def setting(default, help, *, tiny=None, low=-math.inf, above=-math.inf, high=math.inf, choices=None,
            number=None, may_change=False):
    """A dataclass field that is also a flag.

    tiny: the default for tiny models (such as those in assets/), if it differs from the usual one. low,
    high: inclusive bounds; above: an exclusive lower bound. choices: all values that are possible. number:
    how many values the flag takes, as argparse's nargs. may_change: whether a resumed run may change it.
    """
    details = dict(help=help, tiny=default if tiny is None else tiny, low=low, above=above, high=high,
                   choices=choices, number=number, may_change=may_change)
    return dataclasses.field(default=default, metadata=details)


class Settings:
    """What a settings class inherits to check itself: ValueError for a field that is out of its bounds."""

    def __post_init__(self):
        check(type(self), self)


def check(settings, values):
    """ValueError if a field of a settings class is out of its bounds. values: an object with these fields."""
    for field in dataclasses.fields(settings):
        value = getattr(values, field.name)
        details = field.metadata
        bounds = None
        if isinstance(value, (int, float)):
            is_within = details["low"] <= value <= details["high"] and value > details["above"]
            if not math.isfinite(value):
                bounds = "a finite number"
            elif not is_within:
                bounds = bounds_of(details)
        elif details["choices"] and value not in (None, *details["choices"]):
            bounds = f"one of {', '.join(details['choices'])}"
        elif details["number"] == 2 and value is not None and value[0] > value[1]:
            bounds = "two numbers, the lower one first: this range keeps nothing"
        if bounds is not None:
            raise ValueError(f"{field.name} {value!r} is not possible: it must be {bounds}")


def bounds_of(details):
    """The bounds of a number, as text."""
    bounds = f"above {details['above']}" if details["above"] > -math.inf else f"at least {details['low']}"
    return bounds if details["high"] == math.inf else f"{bounds}, at most {details['high']}"


# ------------------------------------------------------------------------------------------------------------
# From settings to flags, and back.


def make_parser(description, groups, is_tiny):
    """A parser with the flags of settings classes. groups: each title in the help -> its class.

    is_tiny: whether the defaults are those for a tiny model. Flags cannot be abbreviated. If two classes have
    a setting of the same name, the first one makes the flag.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    known = set()
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(settings):
            if field.name not in known:
                add_flag(group, field, is_tiny)
            known.add(field.name)
    return parser


def add_flag(group, field, is_tiny):
    """Adds the flag of a field to a group of the parser."""
    details = field.metadata
    default = details["tiny"] if is_tiny else field.default
    more = dict(default=default, help=details["help"].replace("%", "%%"))
    if field.type is bool:
        # A resumed run starts from its saved flags. It needs --no-plain to switch off a saved --plain.
        more["action"] = argparse.BooleanOptionalAction
    else:
        more.update(type=field.type, nargs=details["number"], choices=details["choices"])
    group.add_argument(f"--{field.name}", **more)


def parse(parser, groups, argv):
    """The parsed flags. A value out of its bounds ends the command, with a message that names it."""
    args = parser.parse_args(argv)
    try:
        for settings in groups.values():
            check(settings, args)
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def peek(argv, name, default=None):
    """The value of one flag in argv, read before the parser of all flags exists."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, default=default)
    known, _ = parser.parse_known_args(argv)
    return getattr(known, name.lstrip("-"))


def read_flags(settings, args, **others):
    """An object of a settings class, made from parsed flags. others: fields that do not come from flags."""
    names = [field.name for field in dataclasses.fields(settings) if field.name not in others]
    return settings(**{name: getattr(args, name) for name in names}, **others)


def changeable(groups):
    """Names of the settings that a resumed run may change."""
    return {field.name for settings in groups.values() for field in dataclasses.fields(settings)
            if field.metadata["may_change"]}


def check_same(saved, settings, may_change, path):
    """ValueError if a setting has changed that may not change.

    saved: the settings of the run, as the file `path` holds them. may_change: names that may differ. A name
    that is missing in `saved` or in `settings` is not compared: the flag was added or removed since.
    """
    settings = json.loads(json.dumps(settings))  # as they would come back from a file
    changed = [f"{name} was {saved[name]!r}, is {settings[name]!r}"
               for name in sorted((saved.keys() & settings.keys()) - may_change)
               if saved[name] != settings[name]]
    if changed:
        raise ValueError(f"{path} is of a run with other settings: {'; '.join(changed)}. "
                         "Give the settings of the run, or begin a new run from its newest checkpoint "
                         "(--model, --name). If you had to mend a function of yours, delete its line from "
                         "this file")


# ------------------------------------------------------------------------------------------------------------
# Functions that a user plugs in.


def load_function(spec, built_in, flag):
    """The function that --reward, --advantage, --loss, --views or --strategy names.

    spec: a name among `built_in`, or file.py:function. ValueError that says what is missing.
    """
    if spec in built_in:
        return built_in[spec]
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        what = "names a file without a function" if os.path.isfile(spec) else f"no file {path or spec!r}"
        raise ValueError(f"{flag} {spec}: {what}; give file.py:function, or one of " + ", ".join(built_in))
    # A file is executed once, however many flags name it, and also if it is edited meanwhile. It becomes a
    # module with a name in sys.modules, so that its functions can be pickled for a pool of forked processes.
    # (Python 3.14 and macOS fork only if they are told: mp_context=multiprocessing.get_context("fork").)
    key = "plugin_" + hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:12]
    if key not in sys.modules:
        folder = os.path.dirname(os.path.realpath(path))
        if folder not in sys.path:
            sys.path.append(folder)  # the file may import its neighbours
        module_spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(sys.modules[key])
    function = getattr(sys.modules[key], name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: {path} has no function {name!r}")
    return function


def call(function, **arguments):
    """Calls a function with those of the arguments that it declares. They are passed by name.

    So a user's function lists only what it needs, and still works when an argument is added here.
    """
    wanted = inspect.signature(function).parameters
    bound = function.keywords if isinstance(function, functools.partial) else ()  # what it has fixed stays
    arguments = {name: value for name, value in arguments.items() if name not in bound}
    if takes_all(wanted):
        return function(**arguments)
    unknown = [name for name, parameter in wanted.items()
               if name not in arguments and parameter.default is parameter.empty]
    if unknown:
        name = getattr(function, "__name__", function)  # functools.partial has none
        raise ValueError(f"the function {name} asks for {', '.join(unknown)}, which it cannot be given: "
                         f"there are {', '.join(arguments)}. Declare only these, or give a default to the "
                         "others")
    return function(**{name: value for name, value in arguments.items() if name in wanted})


def declares(function, name):
    """Whether `call` would give a function this argument."""
    wanted = inspect.signature(function).parameters
    return name in wanted or takes_all(wanted)


def takes_all(parameters):
    """Whether there is a **others among the parameters of a function."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
