"""`halo install`: the seven steps in order, and what happens when one of them fails. No step's own logic."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Final

from engine.errors import HaloError
from provision import generations
from provision.context import Action, Context
from provision.desired import PROFILES, format_listen, load_desired, parse_listen
from provision.files import remove_if_empty, remove_tree
from provision.journal import Journal, locked, recover
from provision.layout import Layout, places, resolve_layout, source_root
from provision.render import CROSS, TICK, WARN, Screen
from provision.run import Log
from provision.signals import ending_signals
from provision.steps import activate, engine, model, packages, preflight, units, verify

STEPS: Final = (
    ("preflight", preflight),
    ("packages", packages),
    ("engine", engine),
    ("model", model),
    ("units", units),
    ("activate", activate),
    ("verify", verify),
)


def configure_install(parser: ArgumentParser) -> None:
    """Arguments of `halo install` and `halo plan`."""
    add = parser.add_argument
    add(
        "--profile",
        choices=PROFILES,
        help="what this box must be (auto: strix-halo where that GPU is, else cpu)",
    )
    add("--scope", choices=("user", "system"), help="whose installation (system for root, else user)")
    add("--prefix", type=Path, metavar="DIR", help="where generations live (/opt/halo, or under your home)")
    add("--listen", metavar="ADDR:PORT", help="where the server listens (127.0.0.1:8180)")
    add("--bundle", type=Path, metavar="FILE", help="install from a bundle, with no network")
    add("--no-units", action="store_true", default=None, help="leave systemd alone")
    add("--yes", action="store_true", help="do not ask (implied when stdin is no terminal)")
    add("--dry-run", action="store_true", help="print the plan and change nothing")
    add("--json", action="store_true", help="with --dry-run: print the plan as JSON")


def run_install(args: Namespace) -> int:
    """Install, or with --dry-run say what an install would do."""
    ctx = make_context(args)
    return run_plan(ctx, as_json=args.json) if args.dry_run else run_steps(ctx, ask=not args.yes)


def make_context(args: Namespace) -> Context:
    """Flags over halo.toml over defaults. Reads only."""
    if args.bundle is not None:
        raise HaloError(
            "A bundle carries its own installer.", hint=f"python3 install.py --bundle {args.bundle}"
        )
    prefix = args.prefix
    home = os.environ.get("HALO_GENERATION_DIR", "")
    scope = args.scope
    if prefix is None and home:
        manifest = generations.read_manifest(Path(home)) or {}
        scope = scope or manifest.get("scope")
        prefix = own_prefix(Path(home), scope)
    layout = resolve_layout(scope, prefix)
    desired = load_desired(layout.config).merged(
        profile=args.profile, listen=args.listen, units=None if args.no_units is None else False
    )
    desired = replace(desired, listen=format_listen(*parse_listen(desired.listen)))
    source = source_root()
    bundle = source if (source / "bundle.json").is_file() else None
    return Context(layout, desired, source, Screen(), Log(), bundle)


def own_prefix(generation: Path, scope: str | None) -> Path | None:
    """The prefix of the generation that runs, or None when that is the scope's default anyway."""
    prefix = generation.parent.parent
    standard = places("system" if scope == "system" else "user", None).prefix
    return None if standard == prefix else prefix


def run_plan(ctx: Context, *, as_json: bool = False) -> int:
    """Preflight, then each step's plan. Nothing is written anywhere."""
    stream = sys.stderr if as_json else sys.stdout
    ctx.screen = Screen(stream)
    preflight.apply(ctx)
    plans: list[tuple[str, list[Action]]] = [(name, step.plan(ctx)) for name, step in STEPS]
    total = sum(len(actions) for _, actions in plans)
    if as_json:
        steps = [{"step": name, "actions": [vars(action) for action in actions]} for name, actions in plans]
        print(json.dumps({"schema": 1, "generation": ctx.name, "changes": total, "steps": steps}, indent=1))
        return 0
    ctx.screen.line(
        f"plan for generation {ctx.name} in {ctx.layout.prefix} ({ctx.layout.scope}, {ctx.profile})"
    )
    for number, (name, actions) in enumerate(plans, 1):
        if actions:
            ctx.screen.line(f"({number}/{len(plans)}) {name}")
        for action in actions:
            ctx.screen.line(f"      {action.what}" + (f"  [{action.why}]" if action.why else ""))
    ctx.screen.line("no change" if total == 0 else f"{total} actions; nothing was changed")
    return 0


def run_steps(ctx: Context, *, ask: bool) -> int:
    """The seven steps under the lock; a failure undoes what this run did."""
    ctx.screen.banner(
        generations.version_of(ctx.source), f"{ctx.layout.scope} install in {ctx.layout.prefix}"
    )
    ctx.screen.begin(1, len(STEPS), "preflight")
    try:
        detail = preflight.apply(ctx)
    except (HaloError, OSError) as error:
        # Before anything is written: no lock, no directory, no log.
        ctx.screen.end(CROSS)
        raise translate(error) from error
    seconds = {"preflight": ctx.screen.end(WARN if ctx.warnings else TICK, detail)}
    if ask and not ctx.in_place and not confirmed(ctx):
        ctx.screen.line("nothing was changed")
        return 0
    fresh = Footprint(ctx.layout)
    with ending_signals():
        try:
            with contextlib.ExitStack() as stack:
                begin_run(ctx, stack)
                for number, (name, step) in enumerate(STEPS[1:], 2):
                    run_step(ctx, number, name, step, seconds)
        except BaseException as error:
            roll_back(ctx, fresh, error)
            raise (translate(error) if isinstance(error, OSError) else error) from error
    summary(ctx, seconds)
    return 0


def begin_run(ctx: Context, stack: contextlib.ExitStack) -> None:
    """Lock, log, recovery, journal; in this order."""
    ctx.layout.prefix.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(ctx.layout.lock))
    ctx.log = Log.open(ctx.layout.logs, "install")
    ctx.log.write(f"halo {ctx.version} generation {ctx.name} argv {sys.argv[1:]}")
    for line in recover(ctx.layout):
        ctx.log.write(f"RECOVER {line}")
    ctx.in_place = ctx.in_place and generations.is_sound(ctx.directory)
    ctx.journal = Journal.start(ctx.layout.journal, "install")
    stack.callback(ctx.journal.close)
    trim(ctx.layout.journal, ctx.layout.logs)


def run_step(ctx: Context, number: int, name: str, step: object, seconds: dict[str, float]) -> None:
    """One step between its line's begin and end."""
    ctx.screen.begin(number, len(STEPS), name)
    warned = ctx.warnings
    try:
        detail = step.apply(ctx)  # type: ignore[attr-defined]
    except BaseException:
        ctx.screen.end(CROSS)
        raise
    ctx.log.write(f"STEP {name}: {detail}")
    seconds[name] = ctx.screen.end(WARN if ctx.warnings > warned else TICK, detail)


class Footprint:
    """What of ours was there before the run, so that a failed first install can leave nothing behind."""

    NAMES = (
        "generations",
        "current",
        "previous",
        "models",
        "halo.toml",
        "api-key",
        "api-keys.sha256",
        "state",
    )

    def __init__(self, layout: Layout) -> None:
        self.first = generations.current_id(layout) is None
        places = {layout.prefix / name for name in self.NAMES} | {layout.state}
        places |= {layout.store, layout.receipts, layout.journal, layout.logs, layout.lock}
        self.new = [path for path in places if not os.path.lexists(path)]
        self.new_parents = [path for path in layout.prefix.parents if not path.exists()]
        self.new_parents += [layout.prefix] if not layout.prefix.exists() else []
        for directory in (layout.unit_dir, layout.launcher.parent):
            self.new_parents += [path for path in (directory, *directory.parents) if not path.exists()]

    def remove(self) -> None:
        """Remove what was not there before."""
        for path in self.new:
            remove_tree(path)
        for path in sorted(set(self.new_parents), key=lambda path: -len(path.parts)):
            remove_if_empty(path)


def roll_back(ctx: Context, fresh: Footprint, error: BaseException) -> None:
    """Undo in reverse; a failed first install leaves no trace but the log, in the temporary directory."""
    ctx.log.write(f"FAILED {type(error).__name__}: {error}")
    for what, undo in reversed(ctx.undo):
        try:
            undo()
            ctx.log.write(f"UNDONE {what}")
        except (OSError, HaloError) as trouble:
            ctx.log.write(f"NOT UNDONE {what}: {trouble}")
            ctx.screen.note(WARN, f"could not {what}: {trouble}")
    busy = isinstance(error, HaloError) and "Another halo run" in error.message
    if fresh.first and not busy:
        keep_log(ctx)
        with contextlib.suppress(OSError):
            fresh.remove()
    if ctx.log.path is not None and ctx.log.path.exists():
        ctx.screen.line(f"the full log: {ctx.log.path}")
    if not busy:
        ctx.screen.line("the box is as it was before" if fresh.first else "what ran before is current")


def keep_log(ctx: Context) -> None:
    """Move the log out of the state directory that is about to be removed."""
    if ctx.log.path is None or not ctx.log.path.is_relative_to(ctx.layout.state):
        return
    kept = Log.temporary("install")
    ctx.log.close()
    if kept.path is not None:
        with contextlib.suppress(OSError):
            shutil.copyfile(ctx.log.path, kept.path)
    ctx.log = kept


def translate(error: OSError | HaloError) -> HaloError:
    """The sentence for an error of the operating system."""
    if isinstance(error, HaloError):
        return error
    place = error.filename or "the prefix"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HaloError("The disk is full.", hint=f"df -h {place}; make room and run it again")
    if error.errno == errno.EROFS:
        return HaloError(f"{place} is on a read-only file system.", hint="choose another place: --prefix DIR")
    if error.errno in (errno.EACCES, errno.EPERM):
        return HaloError(
            f"{place} cannot be written.", hint="choose another --prefix DIR, or run it as its owner"
        )
    return HaloError(f"{place}: {error.strerror or error}.", hint="run it again with --debug")


def trim(*directories: Path, keep: int = 50) -> None:
    """Old journals and logs go; the newest `keep` stay."""
    for directory in directories:
        for path in sorted(directory.glob("*"))[:-keep]:
            path.unlink(missing_ok=True)


def confirmed(ctx: Context) -> bool:
    """Ask on a terminal; without one the answer is yes."""
    if not sys.stdin.isatty():
        return True
    ctx.screen.line(f"This makes generation {ctx.name} in {ctx.layout.prefix} and makes it current.")
    answer = input("Go on? [Y/n] ").strip().lower()
    return answer in ("", "y", "yes")


def summary(ctx: Context, seconds: dict[str, float]) -> None:
    """What each step took, what was decoded, and what to type next."""
    screen = ctx.screen
    screen.line()
    screen.line("  ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    if not ctx.changes:
        screen.line(f"no change: generation {ctx.name} is in place ({sum(seconds.values()):.1f} s)")
    else:
        screen.line(f"generation {ctx.name} is current ({sum(seconds.values()):.1f} s)")
    screen.line(f"decoded: {' '.join(ctx.sentence.split())}")
    if ctx.served:
        screen.line(
            f"serving: http://{ctx.desired.listen}/v1  (API key: {ctx.layout.api_key})"
            if ctx.layout.api_key.is_file()
            else f"serving: http://{ctx.desired.listen}/v1"
        )
    onpath = str(ctx.layout.launcher.parent) in os.environ.get("PATH", "").split(":")
    command = "halo" if onpath and ctx.layout.launcher.is_symlink() else f"{ctx.layout.current}/bin/halo"
    screen.line(f'next: {command} chat "How do I extract an archive with tar?"')
    ctx.log.write(f"DONE at {time.time():.0f}")
