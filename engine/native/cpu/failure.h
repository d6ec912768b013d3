// The one exception of the library: a status and a sentence. It ends at the C ABI.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include <string>

#include "../halo.h"

namespace halo {

struct Failure {
  halo_status status;
  std::string message;

  __attribute__((format(printf, 3, 4))) Failure(halo_status code, const char *format, ...) : status(code) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    message = text;
  }
};

}  // namespace halo
