// Plans by number, for callers that know nothing of torch. Numbers are shared by the plans of all
// devices.
#pragma once

#include <cstdint>
#include <memory>

namespace fastprune {

// What is behind a number: ops/plan.h on the CPU, ops/device_plan.h on a GPU.
class KeptPlan {
 public:
  virtual ~KeptPlan() = default;
  // Bytes that it holds now.
  virtual int64_t bytes() = 0;
};

int64_t register_plan(std::shared_ptr<KeptPlan> plan);

// The plan, null when unknown.
std::shared_ptr<KeptPlan> kept_plan(int64_t id);

// Forgets a plan; calls that are running keep it alive until they return. False when unknown.
bool release_plan(int64_t id);

// Bytes that a plan holds now, -1 when unknown.
int64_t plan_bytes(int64_t id);

}  // namespace fastprune
