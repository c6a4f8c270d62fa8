"""Reading what `hivi fit` and `hivi compare` are given: a model in a Python file, and data in NPZ, CSV or JSON."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import typer

from hivi._errors import LoadError, TargetError, message
from hivi.cli.common import MODULE

Data = dict[str, Any]
"""Argument of the model -> array or number."""


def load_model(spec: str) -> Callable[..., Any]:
    """Import MODEL from `FILE.py:MODEL`; the file's folder is importable meanwhile, as for a script.

    Raises:
        typer.BadParameter: not of that form, no such file, or no such function in it.
        TargetError: the file does not run.
    """
    name, colon, attribute = spec.rpartition(":")
    if not colon or not name or not attribute.isidentifier():
        raise typer.BadParameter(f"{spec!r} is not FILE.py:MODEL, such as model.py:model")
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {name!r}")
    module_spec = importlib.util.spec_from_file_location(f"{MODULE}{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise typer.BadParameter(f"{name!r} is not a Python file (its name should end in .py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        found = f"{type(error).__name__} when the file was imported ({error})"
        raise TargetError(message(f"{name}{line}", found, "a Python file that runs", f"try: python {name}")) from error
    finally:
        sys.path.pop(0)
    model = getattr(module, attribute, None)
    if not callable(model):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        found = f"there is no {attribute!r}" if model is None else f"{attribute!r} is a value, not a function,"
        raise typer.BadParameter(f"{found} in {name!r}, which defines {own}")
    return model


def read_data(path: Path) -> Data:
    """Read a data file: arrays by name.

    `.npz`: arrays by name. `.csv`: a header, then numbers; each column is an array, of integers if all its values are.
    `.json`: an object of numbers and (nested) lists of numbers.

    Raises:
        typer.BadParameter: another ending.
        LoadError: naming the file, the line where there is one, and what was expected there.
    """
    readers = {".npz": _read_npz, ".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        text = f"{str(path)!r} ends in none of .npz, .csv and .json; convert it, for example with numpy.savez"
        raise typer.BadParameter(text, param_hint="'--data'")
    return readers[path.suffix.lower()](path)


def bind(model: Callable[..., Any], data: Mapping[str, Any]) -> inspect.BoundArguments:
    """The model's arguments by name.

    Raises:
        TargetError: data that the model does not take, or an argument that the data lack.
    """
    parameters = inspect.signature(model).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    where, takes = f"model {getattr(model, '__name__', 'model')!r}", f"its arguments {list(named)}"
    extra = [n for n in data if n not in named and not takes_all]
    if extra:
        cure = "rename these in the data, or leave them out"
        raise TargetError(message(where, f"data for {extra}, which it does not take", takes, cure))
    missing = [n for n, p in named.items() if p.default is p.empty and n not in data]
    if missing:
        cure = "add them to the data (--data), by these names, or give them defaults in the model"
        raise TargetError(message(where, f"no data for {missing}", takes, cure))
    return inspect.signature(model).bind(**data)


def _read_npz(path: Path) -> Data:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array without a name")
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        cure = "write it with numpy.savez(file, x=..., y=...), without objects"
        raise LoadError(
            message(str(path), f"no readable archive ({error})", "an NPZ file of named arrays", cure)
        ) from None
    for name, value in arrays.items():
        if value.dtype.kind not in "biuf":
            cure = "encode it as numbers"
            raise LoadError(message(f"{path}, array {name!r}", f"values of type {value.dtype}", "real numbers", cure))
    # Plain numbers stay numbers, so that a model may use them as sizes.
    return {name: value.item() if value.ndim == 0 else value for name, value in arrays.items()}


def _read_csv(path: Path) -> Data:
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            blank = 0
            for row in reader:
                if not row:
                    blank = blank or reader.line_num
                    continue
                if blank:  # in a file of one column an empty line is a missing value, not nothing
                    cure = "write a missing value as nan, or delete the line"
                    raise LoadError(message(f"{path}, line {blank}", "an empty line", f"{len(header)} numbers", cure))
                rows.append(_numbers(f"{path}, line {reader.line_num}", header, row))
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path}, line {reader.line_num + 1}"
            raise LoadError(message(where, str(error), "comma-separated numbers in UTF-8", "write it as CSV")) from None
    if not rows:
        raise LoadError(message(f"{path}, line 2", "no rows", "at least one row of numbers", "add the data"))
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    return {name: np.asarray(values) for name, values in columns.items()}


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice or not all(name.isidentifier() for name in header):
        wrong = f"the columns {twice} twice" if twice else repr(",".join(header))
        cure = "name each column as the model's argument"
        raise LoadError(message(f"{path}, line 1", wrong, "a header of distinct names, such as x,y", cure))


def _numbers(where: str, header: list[str], row: list[str]) -> list[int | float]:
    if len(row) != len(header):
        cure = "one value per column in every row"
        raise LoadError(message(where, f"{len(row)} values", f"{len(header)} ({','.join(header)})", cure))
    values: list[int | float] = []
    for name, text in zip(header, row, strict=True):
        try:
            values.append(int(text) if text.strip().lstrip("+-").isdecimal() else float(text))
        except ValueError:
            cure = "correct it; a missing value is written nan"
            raise LoadError(message(f"{where}, column {name!r}", repr(text), "a number", cure)) from None
    return values


def _read_json(path: Path) -> Data:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        what = f"malformed JSON ({error.msg[:1].lower()}{error.msg[1:]})"
        expected = "an object of numbers and lists"
        raise LoadError(message(where, what, expected, "correct the file there")) from None
    except UnicodeDecodeError as error:
        raise LoadError(message(str(path), str(error), "JSON in UTF-8", "write it again as UTF-8")) from None
    if not isinstance(raw, dict):
        cure = 'write {"x": [1, 2], "y": [0.5, 0.7]}'
        raise LoadError(message(str(path), f"a JSON {type(raw).__name__}", "an object: name -> number or list", cure))
    return {name: _json_value(f"{path}, {name!r}", value) for name, value in raw.items()}


def _json_value(where: str, value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.empty(0, object)
    if not isinstance(value, list) or array.dtype.kind not in "biuf":
        found = "a list that is ragged or holds more than numbers" if isinstance(value, list) else repr(value)[:60]
        raise LoadError(message(where, found, "a number, or a rectangular list of numbers", "correct that entry"))
    return array
