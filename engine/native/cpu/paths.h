// Which paths this machine can run, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace halo {

// The paths that this CPU can run, the best first.
std::vector<const Kernels *> usable_paths();

// The path of that name, or the best one for nullptr. Throws Failure for a name that is unknown or cannot run here.
const Kernels &choose_path(const char *name);

}  // namespace halo
