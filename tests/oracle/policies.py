"""Brute-force reference for policy decisions: plain documents, plain sets, no index, no shortcuts.

Purposes and regions are sets of points, so that "covers" is ⊆ and "touches" is ∩. Written from the
words of the design, not from the code under test; slow on purpose.
"""

import math

AI = {"ai-train", "ai-input", "ai-index", "other ai"}
PURPOSES = {
    **{word: {word} for word in ("ai-train", "ai-input", "ai-index", "search", "x-lab")},
    "ai-all": AI,
    "all": AI | {"search", "x-lab", "anything else"},
}
EU = {"DE-BY", "rest of DE", "FR", "rest of EU"}
REGIONS = {
    "DE-BY": {"DE-BY"},
    "DE": {"DE-BY", "rest of DE"},
    "FR": {"FR"},
    "EU": EU,
    "NO": {"NO"},
    "EEA": EU | {"NO", "rest of EEA"},
    "US": {"US"},
}
WORLD = REGIONS["EEA"] | {"US", "rest of the world"}


def points(words, meaning, everything):
    return everything if words is None else set().union(*(meaning[word] for word in words))


def expand(names, sets):
    return {member for name in names for member in sets.get(name, {name})}


def applies(terms, tenant, expert, sets):
    to = {"everyone", f"tenant:{tenant['id']}", *(f"group:{g}" for g in tenant["groups"])}
    mine = expert["owner"] == terms["owner"] and expert["id"] in expand(terms["experts"], sets)
    return mine and terms["assignee"] in to


def touching(terms, purpose, region):
    """Whether a prohibition or requirement is about any part of what a request declares."""
    asked_p = points(None if purpose is None else [purpose], PURPOSES, PURPOSES["all"])
    asked_r = points(None if region is None else [region], REGIONS, WORLD)
    p = points(terms["purposes"], PURPOSES, PURPOSES["all"])
    return bool(asked_p & p) and bool(asked_r & points(terms["regions"], REGIONS, WORLD))


def required(world, tenant, purpose, region, now):
    """The experts that must take part in a request of the tenant: of `public` it may be excused."""
    found = {e["id"] for e in world["experts"] if e["required"] or e["id"] == "public"}
    for terms in world["agreements"]:
        if terms["effect"] == "require" and terms["starts"] <= now < terms["ends"] and touching(terms, purpose, region):
            found |= {e["id"] for e in world["experts"] if applies(terms, tenant, e, world["sets"])}
    return found


def hidden(expert, tenant, world, now):
    sets = world["sets"]
    if expert["required"]:
        return False
    needing = [t for t in world["agreements"] if t["effect"] == "require" and now < t["ends"]]
    if any(applies(t, tenant, expert, sets) for t in needing):
        return False
    if expert["id"] in expand(tenant["hidden"], sets):
        return True
    return expert["visibility"] == "hidden" and expert["id"] not in expand(tenant["listed"], sets)


def entitled(world, tenant, purpose, region, now):
    """The experts that the tenant may use before the request filter."""
    asked_p = points(None if purpose is None else [purpose], PURPOSES, PURPOSES["all"])
    asked_r = points(None if region is None else [region], REGIONS, WORLD)
    must = required(world, tenant, purpose, region, now)
    gate = set()
    for expert in world["experts"]:
        permits = forbids = False
        for terms in world["agreements"]:
            if applies(terms, tenant, expert, world["sets"]) and terms["starts"] <= now < terms["ends"]:
                p = points(terms["purposes"], PURPOSES, PURPOSES["all"])
                r = points(terms["regions"], REGIONS, WORLD)
                permits |= terms["effect"] == "permit" and asked_p <= p and asked_r <= r
                forbids |= terms["effect"] == "prohibit" and touching(terms, purpose, region)
        named = expert["id"] in expand(tenant["expert_ids"], world["sets"])
        listed = named == (tenant["mode"] == "allow_list") or expert["id"] in must
        anchor = expert["id"] == "public"
        unowned = expert["owner"] is None
        licensed = anchor or ((unowned or (permits and not forbids)) and listed)
        if licensed and expert["live"] and not hidden(expert, tenant, world, now):
            gate.add(expert["id"])
    return gate


def decide(world, tenant_id, request, now):
    """`(allowed, excluded)` as sets of ids, or the name of the refusal."""
    tenant = next((t for t in world["tenants"] if t["id"] == tenant_id), None)
    if tenant is None:
        return "UnknownTenant"
    if tenant["archived"]:
        return "TenantArchived"
    for field, declared in (("purposes", request["purpose"]), ("regions", request["region"])):
        if declared is not None and declared not in tenant[field]:
            return "ContextRefused"
    listed = {e["id"] for e in world["experts"] if not hidden(e, tenant, world, now)}
    for name in [*(request["only"] or []), *request["ignore"]]:
        if not expand([name], world["sets"]) & listed:
            return "UnknownExpert"
    may = entitled(world, tenant, request["purpose"], request["region"], now)
    ignore = expand(request["ignore"], world["sets"])
    must = required(world, tenant, request["purpose"], request["region"], now)
    excused = {"public"} if tenant["anchor_optional"] else set()
    for expert in (e["id"] for e in world["experts"] if e["id"] in must - (excused & ignore)):
        if expert in ignore:
            return "ExpertRequired"
        if expert not in may:
            return "RequiredExpertMissing"
    only = expand(request["only"] or [], world["sets"]) & listed
    if only - may:
        return "ExpertDenied"
    kept = filtered(world, tenant, request, may, must)
    if not kept:
        return "EmptyGate"
    gate = [e for e in world["experts"] if e["id"] in kept]
    if any(all(layer in e.get("empty_layers", ()) for e in gate) for layer in range(3)):
        return "LayerWithoutExpert"
    strength = ["unknown", "shared", "router", "removed"].index
    least = tenant.get("min_grade") or "unknown"
    if any(strength(e["grade"]) < strength(least) for e in world["experts"] if e["id"] not in kept and "grade" in e):
        return "GradeTooLow"
    return kept, listed - kept


def filtered(world, tenant, request, may, must):
    """What of `may` a request takes: what it or the tenant wants and what must take part, less what it ignores."""
    wanted = tenant["default_experts"] if request["only"] is None else request["only"]
    kept = may if wanted is None else may & (expand(wanted, world["sets"]) | must)
    return kept - expand(request["ignore"], world["sets"])


def valid_until(world, tenant_id, request, now):
    """The first later moment at which the request would not get all that it has, or something else is required."""
    tenant = next(t for t in world["tenants"] if t["id"] == tenant_id)
    allowed, _ = decide(world, tenant_id, request, now)
    edges = {t[edge] for t in world["agreements"] for edge in ("starts", "ends")}
    for moment in sorted(m for m in edges if now < m < math.inf):
        context = request["purpose"], request["region"], moment
        excused = expand(request["ignore"], world["sets"]) & {"public"}
        may, must = entitled(world, tenant, *context), required(world, tenant, *context)
        if not allowed <= filtered(world, tenant, request, may, must) or must - allowed - excused:
            return moment
    return math.inf


SPECIAL = (
    lambda terms: terms["assignee"].startswith("tenant:"),
    lambda terms: terms["assignee"].startswith("group:"),
    lambda terms: points(terms["purposes"], PURPOSES, PURPOSES["all"]) != PURPOSES["all"],
    lambda terms: terms["regions"] is not None,
)
"""What makes one permission more special than another, the strongest first."""


def counts_under(world, tenant_id, expert_id, request, now):
    """The id of the agreement that a use of an allowed expert counts under; None where it needs none."""
    tenant = next(t for t in world["tenants"] if t["id"] == tenant_id)
    expert = next(e for e in world["experts"] if e["id"] == expert_id)
    asked_p = points(request["purpose"] and [request["purpose"]], PURPOSES, PURPOSES["all"])
    asked_r = points(request["region"] and [request["region"]], REGIONS, WORLD)
    found = [
        terms
        for terms in world["agreements"]
        if terms["effect"] == "permit"
        and applies(terms, tenant, expert, world["sets"])
        and terms["starts"] <= now < terms["ends"]
        and asked_p <= points(terms["purposes"], PURPOSES, PURPOSES["all"])
        and asked_r <= points(terms["regions"], REGIONS, WORLD)
    ]
    for special in SPECIAL:
        found = [terms for terms in found if special(terms)] or found
    newest = max((terms["starts"] for terms in found), default=None)
    return min((terms["id"] for terms in found if terms["starts"] == newest), default=None)
