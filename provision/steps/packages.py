"""Step 2: what is missing of the operating system, through its own package manager, or as hashed wheels."""

from __future__ import annotations

import os

from engine.errors import HaloError
from provision import services, toolchain
from provision.context import Action, Context
from provision.distro import Manager, detect_manager, distribution, install_command
from provision.run import run
from provision.steps.environment import ensure_venv
from provision.venv import choose_interpreter, install, pip_command


def plan(ctx: Context) -> list[Action]:
    """What would be installed, and by whom."""
    actions = []
    manager = detect_manager()
    python = ctx.interpreter()
    if not ctx.in_place and pip_command(python, ctx.directory / "venv", ctx.wheels) is None:
        actions.append(Action(install_command(("venv",), manager), "no pip and no pip wheel is here"))
    if ctx.missing:
        why = f"missing: {', '.join(ctx.missing)}"
        if os.geteuid() == 0 and manager is not None:
            actions.append(Action(install_command(ctx.missing, manager), why))
        else:
            what = "unpack a C++ compiler, CMake and Ninja from wheels, for this build only (minutes)"
            actions.append(Action(what, why))
    return actions


def apply(ctx: Context) -> str:
    """Supply what is missing; returns what was done."""
    if ctx.in_place:
        return "nothing missing"
    manager = detect_manager()
    supplied = []
    if pip_command(ctx.interpreter(), ctx.directory / "venv", ctx.wheels) is None:
        supply_pip(ctx, manager)
        supplied.append("pip")
    if ctx.missing:
        if os.geteuid() == 0 and manager is not None:
            install_system(ctx, manager)
        else:
            unpack_wheels(ctx)
        supplied += ctx.missing
    return f"installed {', '.join(supplied)}" if supplied else "nothing missing"


def supply_pip(ctx: Context, manager: Manager | None) -> None:
    """The one package installed without pyinfra: pyinfra itself needs a pip to come by."""
    command = install_command(("venv",), manager)
    if manager is None or os.geteuid() != 0:
        raise HaloError("This Python has neither pip nor ensurepip.", hint=command)
    with ctx.change("packages", f"install {', '.join(manager.packages['venv'])}"):
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        for argv in (manager.refresh, (*manager.install, *manager.packages["venv"])):
            if argv:
                what = f"{manager.name} cannot install Python's venv"
                run(argv, log=ctx.log, env=env, tick=ctx.screen.tick, what=what)
    ctx.python = choose_interpreter(ctx.layout.scope, ctx.log)
    if pip_command(ctx.python, ctx.directory / "venv", None) is None:
        raise HaloError("This Python has neither pip nor ensurepip, also after an install.", hint=command)


def install_system(ctx: Context, manager: Manager) -> None:
    """Install compiler and CMake with the distribution's manager, through pyinfra's worker."""
    names = [name for feature in ctx.missing for name in manager.packages.get(feature, ())]
    try:
        ensure_venv(ctx)
    except HaloError as error:
        raise missing_error(
            ctx, manager, f"halo's own installer cannot be fetched: {error.message}"
        ) from error
    with ctx.change("packages", f"{manager.name} install {' '.join(names)}", packages=names):
        operation = {"op": "packages", "manager": manager.name, "names": names}
        operation["what"] = f"install {' '.join(names)} with {manager.name}"
        try:
            services.perform(ctx.venv_python, [operation], ctx.log, ctx.screen.tick)
        except HaloError as error:
            raise HaloError(error.message, hint=install_command(ctx.missing, manager)) from error
    ctx.tools, missing = toolchain.system_toolchain()
    if missing:
        raise HaloError(
            f"There is still no {', no '.join(missing)} after installing {' '.join(names)}.",
            hint=install_command(missing, manager),
        )


def unpack_wheels(ctx: Context) -> None:
    """A compiler that comes as wheels: nothing of the operating system is changed."""
    ensure_venv(ctx, packages=False)
    target = ctx.directory / "build/toolchain"
    pip = pip_command(ctx.interpreter(), ctx.directory / "venv", ctx.wheels)
    assert pip is not None, "apply() supplied pip"
    lock = ctx.source / "provision/toolchain.lock"
    try:
        with ctx.change("packages", "unpack a C++ compiler, CMake and Ninja from wheels"):
            install(pip, lock, ctx.log, target=target, tick=ctx.screen.tick)
    except HaloError as error:
        raise missing_error(ctx, detect_manager(), "none can be fetched as wheels.") from error
    ctx.tools = toolchain.wheel_toolchain(target)


def missing_error(ctx: Context, manager: Manager | None, why: str) -> HaloError:
    """The sentence for a box without a compiler that cannot be given one."""
    unknown = "" if manager else f" {distribution()} is a distribution that halo does not know."
    return HaloError(
        f"There is no {', no '.join(ctx.missing)} here, and {why}{unknown}",
        hint=f"{install_command(ctx.missing, manager)}; or install from a bundle: --bundle FILE",
    )
