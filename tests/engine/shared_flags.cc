// A flag that several programs would share, for flags_test.cc.
#include "absl/flags/flag.h"

ABSL_FLAG(int, shared_flag, 2, "Of several programs.");
