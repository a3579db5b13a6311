-- The health of a FineTuneJob, for Argo CD. docs/gitops.md says how to install it.
local status = obj.status or {}
local holds = {} -- type of each condition that is True -> its message
for _, condition in ipairs(status.conditions or {}) do
  if condition.status == "True" then
    holds[condition.type] = condition.message
  end
end

if holds.Failed then
  return {status = "Degraded", message = holds.Failed}
end
if holds.Complete then
  return {status = "Healthy", message = holds.Complete}
end
if status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "the operator has not seen this version yet"}
end
if holds.Suspended then
  return {status = "Suspended", message = holds.Suspended}
end
return {status = "Progressing", message = status.message}
