// Plans by number, for callers that know nothing of torch.
#pragma once

#include <cstdint>

namespace fastprune {

// Forgets a plan; calls that are running keep it alive until they return. False when unknown.
bool release_plan(int64_t id);

// Bytes that a plan holds now, -1 when unknown.
int64_t plan_bytes(int64_t id);

}  // namespace fastprune
