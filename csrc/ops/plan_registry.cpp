#include "ops/plan_registry.h"

#include <mutex>
#include <unordered_map>
#include <utility>

namespace fastprune {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<KeptPlan>> plans;
  int64_t next = 1;
};
// Never destroyed: layers may be released after static destructors have begun.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

}  // namespace

int64_t register_plan(std::shared_ptr<KeptPlan> plan) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.plans.emplace(r.next, std::move(plan));
  return r.next++;
}

std::shared_ptr<KeptPlan> kept_plan(int64_t id) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.plans.find(id);
  return found == r.plans.end() ? nullptr : found->second;
}

bool release_plan(int64_t id) {
  std::shared_ptr<KeptPlan> plan;  // destroyed after the lock is gone
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.plans.find(id);
  if (found == r.plans.end()) return false;
  plan = std::move(found->second);
  r.plans.erase(found);
  return true;
}

int64_t plan_bytes(int64_t id) {
  const std::shared_ptr<KeptPlan> plan = kept_plan(id);
  return plan == nullptr ? -1 : plan->bytes();
}

}  // namespace fastprune
