// Propagation of absl::Status, which the packaged Abseil lacks.
#ifndef MOBI_ENGINE_BASE_STATUS_MACROS_H_
#define MOBI_ENGINE_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define MOBI_RETURN_IF_ERROR(expression)       \
  do {                                         \
    absl::Status mobi_status = (expression);   \
    if (!mobi_status.ok()) return mobi_status; \
  } while (false)

#define MOBI_CONCAT_INNER(a, b) a##b
#define MOBI_CONCAT(a, b) MOBI_CONCAT_INNER(a, b)

#define MOBI_ASSIGN_OR_RETURN(target, expression) \
  MOBI_ASSIGN_OR_RETURN_IMPL(MOBI_CONCAT(mobi_status_or_, __LINE__), target, expression)

#define MOBI_ASSIGN_OR_RETURN_IMPL(status_or, target, expression) \
  auto status_or = (expression);                                  \
  if (!status_or.ok()) return std::move(status_or).status();      \
  target = *std::move(status_or)

#endif  // MOBI_ENGINE_BASE_STATUS_MACROS_H_
