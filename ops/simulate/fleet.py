"""The members of all pools: they start, serve, drain and leave, and the shards' slots follow."""

from __future__ import annotations

from cluster.members import POOLS
from octet.config import OctetConfig
from ops.simulate.clock import Clock
from ops.simulate.costs import Costs
from ops.simulate.decode_pool import DecodePool
from ops.simulate.expert_pool import ExpertPool
from ops.simulate.membership import Membership
from ops.simulate.prefill_worker import PrefillWorker
from ops.simulate.views import Views
from router.balancing.planner import Rebalance
from router.placement import Placement


class Fleet:
    """Whoever leaves ends what it has first."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        config: OctetConfig,
        prefill_pages: int,
        decode: DecodePool,
        experts: ExpertPool,
        views: Views,
        slots_that_fit: int,
    ) -> None:
        self._clock, self._costs, self._config, self._prefill_pages = clock, costs, config, prefill_pages
        self.decode, self.experts, self._views = decode, experts, views
        self.prefill: dict[int, PrefillWorker] = {}
        self._slots_that_fit = slots_that_fit
        self.members = Membership()
        self.slots_filled = 0
        """By rebalances."""

    def begin(self, sizes: dict[str, int]) -> None:
        """Members that were there before."""
        assert self._hold_all(sizes["experts"]), "shards hold every expert"
        for pool in POOLS:
            for _ in range(sizes[pool]):
                self._serve(pool, self.members.order(pool, 0.0))

    def order(self, pool: str, count: int) -> None:
        """Start new members."""
        start_s = self._costs.shard_start_s if pool == "experts" else self._costs.worker_start_s
        for _ in range(count):
            self._clock.after(start_s, self._serve, pool, self.members.order(pool, self._clock.now_s))

    def drain(self, pool: str, count: int) -> None:
        """Let members go: the last shards, or the workers with the least to do."""
        serving = self.members.serving(pool)
        # What starts in place of a lost member cannot be called off here; somebody serves until it is there.
        count = min(count, len(serving) - (self.members.num_starting(pool) > 0))
        if pool == "experts" and count < len(serving):
            # Nor do those go whose experts the others would have no room for.
            while count > 0 and not self._hold_all(len(serving) - count):
                count -= 1
        if pool == "experts":
            chosen = serving[len(serving) - count :]
            if count == len(serving):
                # Nobody asks them for anything; those that come next take everything over.
                self._clock.after(0.0, self._release_shards)
            elif count > 0:
                self._fill(len(serving) - count, self.experts.asked_redundant)
        elif pool == "prefill":
            chosen = sorted(serving, key=lambda number: self.prefill[number].queued_tokens)[:count]
        else:
            chosen = sorted(serving, key=lambda row: float(self.decode.context[row]))[:count]
        for number in chosen:
            self.members.drain(pool, number)
            if pool != "experts":
                self._views.remove(pool, number)
            self.release_if_drained(pool, number)

    def lose_prefill(self, number: int) -> PrefillWorker:
        """Another one starts in its place. Returns: what is no more."""
        self._lose("prefill", number)
        worker = self.prefill.pop(number)
        # Whatever it computes does not end.
        worker.paces += 1
        self._views.learn(number, [], worker.forget())
        return worker

    def lose_decode(self, row: int) -> None:
        """Another one starts in its place."""
        self._lose("decode", row)

    def lose_shard(self, number: int) -> float:
        """Another one starts in its place. Returns: after how long survivors hold what only this one held.

        Where they have no room for it, that is when the other one serves.
        """
        shard = self.members.serving("experts").index(number)
        self._lose("experts", number)
        left = len(self.members.serving("experts"))
        present = self.experts.placement
        if shard >= present.num_shards or not self._hold_all(left):
            return self._costs.shard_start_s
        without_s = self.experts.without_s(shard)
        self._clock.after(without_s, self._adopt, self._planned(left, self.experts.asked_redundant))
        return without_s

    def _lose(self, pool: str, number: int) -> None:
        self.members.lose(pool, number, self._clock.now_s)
        if pool != "experts":
            self._views.remove(pool, number)
        self.order(pool, 1)

    def resize_redundancy(self, redundant: int) -> None:
        self._fill(self.experts.num_shards, redundant)

    def rebalance(self) -> None:
        """Look at the loads of now, and ask the balancer."""
        self.experts.drift(self._clock.now_s)
        found = self.experts.rebalanced()
        if found is not None:
            self._clock.after(self.experts.fill_s(len(found.moves)), self._rebalanced, found)

    def release_if_drained(self, pool: str, number: int) -> None:
        if not self.members.is_draining(pool, number):
            return
        if pool == "prefill" and self.prefill[number].idle:
            self._views.learn(number, [], self.prefill.pop(number).forget())
            self.members.release(pool, number, self._clock.now_s)
        elif pool == "decode" and self.decode.idle(number) and not self._views.expects(number):
            self.members.release(pool, number, self._clock.now_s)

    def gpu_hours(self) -> dict[str, float]:
        """So far, by pool."""
        hours = {}
        for pool in POOLS:
            gpus = getattr(self._config.pools, pool).num_gpus or 1
            hours[str(pool)] = self.members.member_s(pool, self._clock.now_s) * gpus / 3600
        return hours

    def _serve(self, pool: str, number: int) -> None:
        now_s = self._clock.now_s
        self.members.serve(pool, number, now_s)
        if pool == "experts":
            if now_s > 0 and self.members.num_starting("experts") == 0:
                # Slots were filled while they started, for all that were ordered together.
                serving = len(self.members.serving("experts"))
                self.experts.adopt(self._planned(serving, self.experts.asked_redundant))
            return
        if pool == "prefill":
            page_size, most = self._config.kv.page_size, self._config.prefill.max_requests
            few = self._config.pools.prefill.few_prompts
            self.prefill[number] = PrefillWorker(number, self._prefill_pages, page_size, most, few)
        else:
            row = self.decode.add_row(now_s)
            assert row == number, "rows are numbered as members are"
        self._views.add(pool, number)

    def _hold_all(self, num_shards: int) -> bool:
        return num_shards * self._slots_that_fit >= self.experts.placement.num_experts

    def _planned(self, num_shards: int, redundant: int) -> Placement:
        assert self._hold_all(num_shards), "shards hold every expert"
        return self.experts.planned(num_shards, redundant)

    def _fill(self, num_shards: int, redundant: int) -> None:
        """Shards serve the old placement until the new one is in their slots."""
        placement = self._planned(num_shards, redundant)
        self.experts.asked_redundant = redundant
        moved = int((placement.physical_to_logical >= 0).sum())
        self._clock.after(self.experts.fill_s(moved), self._adopt, placement)

    def _adopt(self, placement: Placement) -> None:
        # Shards may have come or gone meanwhile; then another placement is on its way.
        if placement.num_shards == len(self.members.serving("experts")):
            self.experts.adopt(placement)
        self._release_shards()

    def _release_shards(self) -> None:
        for number in self.members.draining("experts"):
            self.members.release("experts", number, self._clock.now_s)

    def _rebalanced(self, found: Rebalance) -> None:
        present = self.experts.placement
        if (found.placement.num_shards, found.placement.slots_per_shard) == (
            present.num_shards,
            present.slots_per_shard,
        ):
            self.slots_filled += len(found.moves)
            self.experts.adopt(found.placement)
