"""What Redis does in one step for the job records: the Lua that the store runs.

Time is the server's own (`TIME`), so that no host's clock matters.
"""

# How long the record of an ended run, its events and its idempotency key stay; the volume keeps the record for good.
ENDED_S = 7 * 86_400

_COMMON = f"""
local function now() local t = redis.call('TIME'); return t[1] + t[2] / 1e6 end
-- Puts record `id` into the set of its state ('' for none), and sees to what an end brings with it.
local function enter(job, set, id, webhook, key)
  if set ~= '' then
    if string.sub(set, 1, 20) == 'tandem:state:QUEUED:' then
      redis.call('SADD', 'tandem:queues_used', string.sub(set, 21))
    end
    redis.call('ZADD', set, 'NX', now(), id)
    redis.call('PERSIST', job)
    redis.call('PERSIST', 'tandem:events:' .. id)
    if key ~= '' then redis.call('PERSIST', key) end
  else
    redis.call('EXPIRE', job, {ENDED_S})
    redis.call('EXPIRE', 'tandem:events:' .. id, {ENDED_S})
    if key ~= '' then redis.call('EXPIRE', key, {ENDED_S}) end
    if webhook == '1' then
      redis.call('ZADD', 'tandem:webhooks', now(), id)
      redis.call('HDEL', 'tandem:webhook_tries', id)
    end
  end
end
"""

# KEYS: job, idempotency key or ''; ARGV: before, after, run_id, old set, new set, '1' if the end is to be told.
COMPARE_AND_SET = (
    _COMMON
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[4] ~= ARGV[5] then
  if ARGV[4] ~= '' then redis.call('ZREM', ARGV[4], ARGV[3]) end
  enter(KEYS[1], ARGV[5], ARGV[3], ARGV[6], KEYS[2])
end
return 1
"""
)

# KEYS: job, idempotency key or ''; ARGV: record, run_id, set, sweep set or ''.
# Returns the run_id that the key belongs to: another's where the key was used before.
CREATE = (
    _COMMON
    + """
if KEYS[2] ~= '' then
  local owner = redis.call('GET', KEYS[2])
  if owner and owner ~= ARGV[2] then return owner end
  redis.call('SET', KEYS[2], ARGV[2])
end
if redis.call('SET', KEYS[1], ARGV[1], 'NX') then
  enter(KEYS[1], ARGV[3], ARGV[2], '0', KEYS[2])
  if ARGV[4] ~= '' then redis.call('SADD', ARGV[4], ARGV[2]) end
  return 1
end
return 0
"""
)

# Prolongs a lease that is ours, and takes one that has lapsed; whoever took the run meanwhile raised its attempt, which
# fences us off at the next write.
RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

# Claims one webhook that is due and puts it off by ARGV[1] seconds, so that nobody else tells it meanwhile.
CLAIM_WEBHOOK = (
    _COMMON
    + """
local due = redis.call('ZRANGEBYSCORE', 'tandem:webhooks', '-inf', now(), 'LIMIT', 0, 1)
if #due == 0 then return false end
local at = tostring(now() + ARGV[1])
redis.call('ZADD', 'tandem:webhooks', at, due[1])
local try = redis.call('HINCRBY', 'tandem:webhook_tries', due[1], 1)
return {due[1], try, redis.call('ZSCORE', 'tandem:webhooks', due[1])}
"""
)

# KEYS: -; ARGV: run_id, the score it was claimed with: a later end of the same run stays.
DROP_WEBHOOK = """
if redis.call('ZSCORE', 'tandem:webhooks', ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('ZREM', 'tandem:webhooks', ARGV[1])
redis.call('HDEL', 'tandem:webhook_tries', ARGV[1])
return 1
"""
