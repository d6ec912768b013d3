#!/bin/sh
# Read a box in one pass and print what was seen as one stream. It judges nothing and changes nothing: no
# root, no network, no file written, a bounded output. checks/facts.py turns the stream into facts.
#
#   sh gather.sh [--root DIR] [PATH ...]
#
# PATH: a place whose free space and rights are asked. --root DIR: read the files of another tree (a test's,
# an image's) and run no command.
#
# The stream, version 1, is lines. A line that begins with one space belongs to the record above it, so that
# no content can pretend to be a record; an empty line ends an unterminated last line and means nothing.
#   halo-facts 1 LIMIT            first line; LIMIT: bytes at which a body is cut
#   @file STATE PATH              STATE: present absent denied; body: the file
#   @path KIND RIGHTS PATH        KIND: file dir char block other absent denied; RIGHTS: r- rw -w -- by access(2)
#   @cmd NAME                     body: stdout and stderr; then "@exit CODE"
#   @tool NAME [PATH]             where PATH finds it; no PATH: nowhere
#   @env NAME                     set in the environment; body: its value
#   @list NAME                    body: one item a line
#   @disk PATH                    body: df -Pk of the nearest place that exists; then a @path of that place
#   @end                          last line; a stream without it was cut off
set -u
LC_ALL=C
export LC_ALL
PATH=${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin
limit=65536
root=
if [ "${1-}" = --root ]; then
    root=$2
    shift 2
fi
newline='
'

# A tool that hangs must not hang the pass; where there is no timeout(1), the caller's clock is the bound. That
# of busybox is not used: its watcher holds our pipe open for a second after every command. It has no --version.
guard=
if timeout --version >/dev/null 2>&1; then guard="timeout 5"; fi
if command -v head >/dev/null 2>&1; then
    clip() { head -c "$limit"; }
else
    clip() { dd bs="$limit" count=1 2>/dev/null; }
fi
if command -v sed >/dev/null 2>&1; then
    indent() { sed 's/^/ /'; }
else
    indent() { while IFS= read -r line || [ -n "$line" ]; do printf ' %s\n' "$line"; done; }
fi

# state PATH: sets $st to present, absent or denied. A path below a directory that may not be searched is
# denied, not absent: nobody can know whether it is there.
state() {
    st=present
    if [ -e "$root$1" ]; then
        [ -r "$root$1" ] || st=denied
        return 0
    fi
    st=absent
    up=${1%/*}
    while [ -n "$up" ] && [ ! -e "$root$up" ]; do up=${up%/*}; done
    if [ -d "$root$up/" ] && [ ! -x "$root$up/" ]; then st=denied; fi
    return 0
}

# file PATH: any file, through two small processes.
file() {
    state "$1"
    if [ "$st" = present ] && [ -d "$root$1" ]; then st=absent; fi
    printf '@file %s %s\n' "$st" "$1"
    if [ "$st" != present ]; then return 0; fi
    # The braces take the message of a redirection that fails.
    { clip <"$root$1" | indent; } 2>/dev/null
    echo
}

# attr PATH: a kernel attribute, at most a page by the kernel's own rule, so read without any process.
attr() {
    state "$1"
    printf '@file %s %s\n' "$st" "$1"
    if [ "$st" != present ]; then return 0; fi
    seen=0
    {
        while { IFS= read -r line || [ -n "$line" ]; } && [ "$seen" -lt 400 ]; do
            printf ' %s\n' "$line"
            seen=$((seen + 1))
        done <"$root$1"
    } 2>/dev/null
    return 0
}

path() {
    state "$1"
    kind=$st
    rights=
    if [ -e "$root$1" ]; then
        kind=other
        if [ -f "$root$1" ]; then kind=file; fi
        if [ -d "$root$1" ]; then kind=dir; fi
        if [ -c "$root$1" ]; then kind=char; fi
        if [ -b "$root$1" ]; then kind=block; fi
    fi
    if [ -r "$root$1" ]; then rights=r; else rights=-; fi
    if [ -w "$root$1" ]; then rights=${rights}w; else rights=$rights-; fi
    printf '@path %s %s %s\n' "$kind" "$rights" "$1"
}

run() {
    if [ -n "$root" ]; then return 0; fi
    printf '@cmd %s\n' "$1"
    shift
    {
        code=$({ { $guard "$@" </dev/null 2>&1; echo $? >&3; } | clip | indent >&4; } 3>&1)
    } 4>&1
    printf '\n@exit %s\n' "${code:-126}"
}

# tool NAME: sets $found.
tool() {
    found=
    if [ -n "$root" ]; then
        for dir in /usr/local/bin /usr/bin /bin /usr/sbin /sbin; do
            if [ -z "$found" ] && [ -x "$root$dir/$1" ]; then found=$dir/$1; fi
        done
    else
        found=$(command -v "$1" 2>/dev/null) || found=
    fi
    case $found in
    /*) printf '@tool %s %s\n' "$1" "$found" ;;
    *) found= && printf '@tool %s\n' "$1" ;;
    esac
}

env_value() {
    if [ -n "$root" ]; then return 0; fi
    eval "value=\${$1-}"
    if [ -z "$value" ]; then return 0; fi
    printf '@env %s\n' "$1"
    printf '%s\n' "$value" | clip | indent
    echo
}

operating_system() {
    file /etc/os-release
    file /usr/lib/os-release
    for f in /etc/NIXOS /run/ostree-booted /usr/share/ublue-os/image-info.json /.dockerenv \
        /run/.containerenv /run/systemd/container; do path "$f"; done
    run uname uname -srm
    attr /proc/sys/kernel/osrelease
    file /proc/cmdline
    file /proc/meminfo
    file /proc/self/limits
    file /proc/self/mountinfo
    run cpuinfo sed '/^$/q' /proc/cpuinfo
    for f in sys_vendor product_name board_name bios_version; do attr "/sys/class/dmi/id/$f"; done
}

who() {
    run id id
    run groups sed -n -e '/^render:/p' -e '/^video:/p' /etc/group
    for name in HSA_OVERRIDE_GFX_VERSION HSA_ENABLE_SDMA ROCM_PATH HIP_PATH HIP_DEVICE_LIB_PATH CC CXX \
        XDG_RUNTIME_DIR XDG_DATA_HOME LD_LIBRARY_PATH; do env_value "$name"; done
    run hsa-override grep -s HSA_OVERRIDE_GFX_VERSION /etc/environment /etc/profile /etc/profile.d/*.sh \
        "${HOME:-/nonexistent}"/.config/environment.d/*.conf "${HOME:-/nonexistent}/.profile" \
        "${HOME:-/nonexistent}/.bashrc"
}

amd_device() {
    for f in vendor device revision class subsystem_vendor subsystem_device uevent numa_node; do
        attr "$1/$f"
    done
    for f in "$root$1"/mem_info_*_total "$root$1"/mem_info_*_used "$root$1"/fw_version/*_fw_version \
        "$root$1"/power_dpm_force_performance_level "$root$1"/fw_version "$root$1"/vbnv; do
        if [ -f "$f" ]; then attr "${f#"$root"}"; fi
    done
}

# Every PCI function is looked at, and those that matter are read whole: a GPU whose driver is not bound has
# no DRM card to be found by.
devices() {
    path /sys/bus/pci/devices
    for d in "$root"/sys/bus/pci/devices/*; do
        vendor= && device= && class=
        { IFS= read -r vendor <"$d/vendor"; } 2>/dev/null
        case $vendor in
        0x1002)
            { IFS= read -r class <"$d/class"; } 2>/dev/null
            case $class in 0x03*) amd_device "${d#"$root"}" ;; esac
            ;;
        0x1022)
            { IFS= read -r device <"$d/device"; } 2>/dev/null
            case $device in 0x17f0 | 0x1502) amd_device "${d#"$root"}" ;; esac
            ;;
        esac
    done
    path /sys/class/kfd/kfd/topology/nodes
    for d in "$root"/sys/class/kfd/kfd/topology/nodes/*; do
        if [ ! -d "$d" ]; then continue; fi
        attr "${d#"$root"}/properties"
        if [ -e "$d/mem_banks/0/properties" ]; then attr "${d#"$root"}/mem_banks/0/properties"; fi
    done
    path /dev/kfd
    for f in "$root"/dev/dri/card* "$root"/dev/dri/render* "$root"/dev/accel/*; do
        if [ -e "$f" ]; then path "${f#"$root"}"; fi
    done
}

modules() {
    for m in amdgpu amdttm ttm amdxdna; do
        path "/sys/module/$m"
        if [ -f "$root/sys/module/$m/version" ]; then attr "/sys/module/$m/version"; fi
    done
    for f in ttm/parameters/pages_limit ttm/parameters/page_pool_size amdttm/parameters/pages_limit \
        amdttm/parameters/page_pool_size amdgpu/parameters/gttsize amdgpu/parameters/cwsr_enable; do
        attr "/sys/module/$f"
    done
    release=
    { IFS= read -r release </proc/sys/kernel/osrelease; } 2>/dev/null
    run amdxdna-on-disk grep -s amdxdna "/lib/modules/$release/modules.dep" \
        "/lib/modules/$release/modules.builtin"
}

rocm_root() {
    if [ ! -d "$root$1" ]; then return 0; fi
    roots="$roots$1$newline"
    for f in bin/hipcc bin/amdclang++ llvm/bin/clang++ lib/llvm/bin/clang++; do
        if [ -e "$root$1/$f" ]; then path "$1/$f"; fi
    done
    for f in "$root$1"/lib*/cmake/hip/hip-config.cmake "$root$1"/lib/*/cmake/hip/hip-config.cmake; do
        if [ -e "$f" ]; then path "${f#"$root"}"; fi
    done
    for f in .info/version include/rocm-core/rocm_version.h include/hip/hip_version.h; do
        if [ -e "$root$1/$f" ]; then file "$1/$f"; fi
    done
}

rocm() {
    roots=
    if [ -z "$root" ]; then
        for value in "${ROCM_PATH-}" "${HIP_PATH-}"; do
            case $value in *"$newline"* | '') ;; /*) rocm_root "${value%/}" ;; esac
        done
    fi
    for d in "$root"/opt/rocm "$root"/opt/rocm/core "$root"/opt/rocm-* "$root"/usr; do
        rocm_root "${d#"$root"}"
    done
    printf '@list rocm-roots\n'
    printf '%s' "$roots" | indent
    for t in hipcc rocminfo rocm-sdk; do tool $t; done
}

python='import importlib.util as u, sys
print("version", ".".join(map(str, sys.version_info[:3])))
for m in ("venv", "ensurepip", "pip", "ssl", "ctypes", "lzma", "zlib"):
    print(m, "yes" if u.find_spec(m) else "no")'

tools() {
    for t in c++ g++ clang++ cmake ninja make; do
        tool $t
        if [ -n "$found" ]; then run "$t --version" "$found" --version; fi
    done
    for t in python3 python3.11 python3.12 python3.13 python3.14; do
        tool $t
        if [ -n "$found" ]; then run "$t features" "$found" -I -c "$python"; fi
    done
    for t in apt-get dnf pacman zypper apk rpm-ostree nix-env toolbox distrobox podman systemctl loginctl \
        sudo git curl uv dkms; do tool $t; done
}

units() {
    attr /proc/1/comm
    path /run/systemd/system
    uid=0
    user=root
    if [ -z "$root" ]; then
        uid=$(id -u 2>/dev/null) || uid=0
        user=$(id -un 2>/dev/null) || user=$uid
    fi
    path "/run/user/$uid/systemd/private"
    path "/var/lib/systemd/linger/$user"
    if [ -n "$root" ] || [ ! -d /run/systemd/system ] || ! command -v systemctl >/dev/null 2>&1; then
        return 0
    fi
    keys=Id,LoadState,ActiveState,SubState,UnitFileState,FragmentPath,Listen,NRestarts,Result
    run "systemctl --version" systemctl --version
    run "systemctl show" systemctl --system show -p "$keys" halo-server.socket halo-server.service
    if [ -S "/run/user/$uid/systemd/private" ]; then
        XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$uid}
        export XDG_RUNTIME_DIR
        run "systemctl --user show" systemctl --user show -p "$keys" halo-server.socket halo-server.service
    fi
}

ports() {
    for f in /proc/net/tcp /proc/net/tcp6; do
        if [ -r "$f" ]; then run "$f" sed -n '/:0000 0A /p' "$f"; fi
    done
}

disks() {
    for p in "$@"; do
        case $p in *"$newline"*) continue ;; /*) ;; *) continue ;; esac
        near=$p
        while [ -n "$near" ] && [ ! -e "$root$near" ]; do near=${near%/*}; done
        printf '@disk %s\n' "$p"
        if [ -z "$root" ]; then { $guard df -Pk "${near:-/}" | indent; } 2>/dev/null; fi
        path "${near:-/}"
    done
}

printf 'halo-facts 1 %s\n' "$limit"
operating_system
who
devices
modules
rocm
tools
units
ports
disks "$@"
printf '@end\n'
