//! Deadlines of connections: when a peer has taken too long, and what is done about it.
//!
//! Before it: [`crate::connection`] says what it waits for.
//! After it: [`crate::accept`] shuts the socket down; the operation that waited fails, and the connection answers.
//! Thread: one reactor. Allocates: a table with a place for every connection, at start.
//! Invariant: an operation that the kernel has is never raced against a timer; it is made to fail, and awaited.
//! Not here: how long a request waits for memory (`limits.wait`).
//!
//! A sweep over one dense array, some times a second, instead of a timer per connection: setting a deadline is one
//! store, and looking at 10,000 of them is a pass over 80 KB.
//! Time is that of the last sweep, so setting one does not ask the clock either.
//!
//! Who keeps a slab that somebody waits for has less time: a few hundred slow senders would otherwise have all slabs for as
//! long as their deadlines let them, and nobody else would be served. As many are cut as wait.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::config;
use crate::limits::SLAB_CLASS_COUNT_MAX;

/// Milliseconds since the core's start.
type Millis = u64;

const NEVER: Millis = Millis::MAX;

/// A deadline is noticed at most this much late.
const SWEEP_PERIOD_MAX: Duration = Duration::from_millis(100);

/// What is shut down when a deadline passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Reading ends; an answer can still be written.
    Reading,
    /// The peer does not read, so there is nothing more to say.
    Both,
}

/// The deadlines of one core's connections, and the time they are held against.
pub struct Deadlines {
    started_at: Instant,
    now: Cell<Millis>,
    period: Cell<Duration>,
    at: Box<[Cell<Millis>]>,
    cut: Box<[Cell<Cut>]>,
    /// From when on the slab that a connection keeps is somebody else's, if one waits for it.
    contended_at: Box<[Cell<Millis>]>,
    class_index: Box<[Cell<u8>]>,
    allowed: Cell<Allowed>,
}

/// How long each phase may take.
#[derive(Debug, Clone, Copy)]
struct Allowed {
    handshake: Millis,
    head: Millis,
    body_start: Millis,
    body: Millis,
    rate_window: Millis,
    /// Bytes that each window must bring.
    rate_window_size: usize,
    contended: Millis,
    write: Millis,
    idle: Millis,
}

impl Allowed {
    /// With how often to sweep.
    fn new(config: &config::Deadlines) -> (Duration, Self) {
        let shortest = [
            config.handshake,
            config.head,
            config.body_start,
            config.body,
            config.body_rate_window,
            config.contended,
            config.write,
            config.idle,
        ]
        .into_iter()
        .min()
        .unwrap_or(SWEEP_PERIOD_MAX);
        let period = (shortest / 4).clamp(Duration::from_millis(1), SWEEP_PERIOD_MAX);
        // `now` is up to a period old, and nobody's time is cut short for it.
        let allowed = |duration: Duration| millis(duration + period);
        let window_size = config.body_rate as u128 * config.body_rate_window.as_millis() / 1000;
        let allowed = Allowed {
            handshake: allowed(config.handshake),
            head: allowed(config.head),
            body_start: allowed(config.body_start),
            body: allowed(config.body),
            rate_window: allowed(config.body_rate_window),
            rate_window_size: usize::try_from(window_size).unwrap_or(usize::MAX),
            contended: allowed(config.contended),
            write: allowed(config.write),
            idle: allowed(config.idle),
        };
        (period, allowed)
    }
}

impl Deadlines {
    /// For connections with an index below `connections_max`.
    pub fn new(config: &config::Deadlines, connections_max: usize) -> Self {
        let (period, allowed) = Allowed::new(config);
        Deadlines {
            started_at: Instant::now(),
            now: Cell::new(0),
            period: Cell::new(period),
            at: (0..connections_max).map(|_| Cell::new(NEVER)).collect(),
            cut: (0..connections_max).map(|_| Cell::new(Cut::Both)).collect(),
            contended_at: (0..connections_max).map(|_| Cell::new(NEVER)).collect(),
            class_index: (0..connections_max).map(|_| Cell::new(0)).collect(),
            allowed: Cell::new(allowed),
        }
    }

    /// Gives other deadlines to what begins from now on; what has one keeps it.
    pub fn allow(&self, config: &config::Deadlines) {
        let (period, allowed) = Allowed::new(config);
        self.period.set(period);
        self.allowed.set(allowed);
    }

    /// Milliseconds since the core's start, as of the last sweep.
    pub fn now(&self) -> u64 {
        self.now.get()
    }

    /// A moment that is now or a little later, without a look at the clock.
    pub fn soon(&self) -> Instant {
        self.started_at + Duration::from_millis(self.now.get()) + 2 * self.period.get()
    }

    /// Whether the time is over, for who looks for himself.
    pub fn has_passed(&self, pace: &Pace) -> bool {
        pace.at <= self.now.get()
    }

    /// When a slab that is kept is somebody else's, if one waits for it.
    pub fn contended_instant(&self, pace: &Pace) -> Instant {
        self.started_at + Duration::from_millis(pace.contended_at)
    }

    /// When the time is over.
    pub fn instant(&self, pace: &Pace) -> Instant {
        self.started_at + Duration::from_millis(pace.at)
    }

    /// How often to sweep.
    pub fn period(&self) -> Duration {
        self.period.get()
    }

    /// Sets the connection's deadline, in place of the one it had.
    pub fn set(&self, index: usize, pace: &Pace, cut: Cut) {
        self.at[index].set(pace.at);
        self.cut[index].set(cut);
    }

    /// The same for a connection that keeps a slab of this class while it waits to read.
    pub fn set_keeping(&self, index: usize, pace: &Pace, class_index: usize) {
        self.set(index, pace, Cut::Reading);
        self.contended_at[index].set(pace.contended_at);
        self.class_index[index].set(class_index as u8);
    }

    /// Takes the connection's deadline away.
    pub fn clear(&self, index: usize) {
        self.at[index].set(NEVER);
        self.contended_at[index].set(NEVER);
    }

    /// Moves the time on, and gives every connection whose deadline has passed to `expire`; it has none from then on.
    /// `waiting` says how many wait for a slab of each class.
    pub fn sweep(&self, waiting: [usize; SLAB_CLASS_COUNT_MAX], expire: impl FnMut(usize, Cut)) {
        self.sweep_at(millis(self.started_at.elapsed()), waiting, expire);
    }

    fn sweep_at(
        &self,
        now: Millis,
        mut waiting: [usize; SLAB_CLASS_COUNT_MAX],
        mut expire: impl FnMut(usize, Cut),
    ) {
        self.now.set(now);
        for (index, at) in self.at.iter().enumerate() {
            let is_over = at.get() <= now;
            let has_a_turn = |waiting: &mut [usize; SLAB_CLASS_COUNT_MAX]| {
                let waiting = &mut waiting[usize::from(self.class_index[index].get())];
                let waits = *waiting > 0;
                *waiting -= usize::from(waits);
                waits
            };
            if is_over || (self.contended_at[index].get() <= now && has_a_turn(&mut waiting)) {
                self.clear(index);
                expire(index, self.cut[index].get());
            }
        }
    }

    /// A TLS handshake that begins now.
    pub fn handshake(&self) -> Pace {
        self.until(self.allowed.get().handshake)
    }

    /// A head that begins now: all of it in one time, however it trickles.
    pub fn head(&self) -> Pace {
        self.until(self.allowed.get().head)
    }

    /// A reply that is written now.
    pub fn write(&self) -> Pace {
        self.until(self.allowed.get().write)
    }

    /// The wait for a request that begins now.
    pub fn idle(&self) -> Pace {
        self.until(self.allowed.get().idle)
    }

    /// A body that begins now, `size` bytes of which are there already.
    pub fn body(&self, size: usize) -> Pace {
        let now = self.now.get();
        let end = now + self.allowed.get().body;
        let mut pace = Pace {
            at: end.min(now + self.allowed.get().body_start),
            end,
            contended_at: now + self.allowed.get().contended,
            window_size: 0,
            is_body: true,
        };
        self.came(&mut pace, size);
        pace
    }

    /// Begins a wait that is not the peer's fault: for memory, for the answers before.
    pub fn pause(&self) -> Pause {
        Pause {
            began: self.now.get(),
        }
    }

    /// Ends a wait, which costs the peer nothing of its time.
    pub fn resume(&self, pace: &mut Pace, pause: Pause) {
        let waited = self.now.get() - pause.began;
        if waited > 0 {
            // The two sweeps that it was measured by may be a period closer than its ends.
            let waited = waited + millis(self.period.get());
            pace.at = pace.at.saturating_add(waited);
            pace.end = pace.end.saturating_add(waited);
            pace.contended_at = pace.contended_at.saturating_add(waited);
        }
    }

    fn until(&self, allowed: Millis) -> Pace {
        let end = self.now.get() + allowed;
        Pace {
            at: end,
            end,
            contended_at: self.now.get() + self.allowed.get().contended,
            window_size: 0,
            is_body: false,
        }
    }

    /// Notes that `size` bytes came. A body then has a new window to bring its next bytes in, once it has brought
    /// those of this one; so a sender at the least rate or above never meets a deadline but the last.
    pub fn came(&self, pace: &mut Pace, size: usize) {
        if !pace.is_body || size == 0 {
            return;
        }
        let is_first = pace.window_size == 0;
        pace.window_size += size;
        if is_first || pace.window_size > self.allowed.get().rate_window_size {
            // Not zero: zero is for a body of which nothing has come.
            pace.window_size = 1;
            pace.at = pace
                .end
                .min(self.now.get() + self.allowed.get().rate_window);
            pace.contended_at = self.now.get() + self.allowed.get().contended;
        }
    }
}

/// How fast something has to come: its next deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    at: Millis,
    /// The last one, however much comes.
    end: Millis,
    /// The next one where somebody waits for the slab.
    contended_at: Millis,
    /// Bytes that came in this window, and one.
    window_size: usize,
    is_body: bool,
}

/// A wait that a deadline stands still for.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    began: Millis,
}

fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(NEVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rates in bytes per second; sweeps every 100 ms.
    fn deadlines() -> Deadlines {
        Deadlines::new(&config::Config::default().deadlines, 8)
    }

    fn expired(deadlines: &Deadlines, now: Millis) -> Vec<(usize, Cut)> {
        let mut expired = Vec::new();
        deadlines.sweep_at(now, [0; SLAB_CLASS_COUNT_MAX], |index, cut| {
            expired.push((index, cut));
        });
        expired
    }

    #[test]
    fn a_deadline_passes_once_and_only_for_who_still_has_it() {
        let deadlines = deadlines();
        let _ = expired(&deadlines, 5_000);
        deadlines.set(1, &deadlines.head(), Cut::Reading);
        deadlines.set(3, &deadlines.write(), Cut::Both);
        deadlines.set(4, &deadlines.head(), Cut::Reading);
        deadlines.clear(4);
        deadlines.set(5, &deadlines.head(), Cut::Reading);
        deadlines.set(5, &deadlines.idle(), Cut::Reading);
        assert_eq!(expired(&deadlines, 15_000), []);
        assert_eq!(
            expired(&deadlines, 15_100),
            [(1, Cut::Reading), (3, Cut::Both)]
        );
        assert_eq!(expired(&deadlines, 80_099), []);
        assert_eq!(expired(&deadlines, 80_100), [(5, Cut::Reading)]);
        assert_eq!(expired(&deadlines, NEVER - 1), []);
    }

    #[test]
    fn who_keeps_a_slab_that_others_wait_for_is_cut_sooner_and_no_more_than_wait() {
        let deadlines = deadlines();
        let expired_beside = |now, waiting: &[usize]| {
            let mut of_classes = [0; SLAB_CLASS_COUNT_MAX];
            of_classes[..waiting.len()].copy_from_slice(waiting);
            let mut expired = Vec::new();
            deadlines.sweep_at(now, of_classes, |index, _| expired.push(index));
            expired
        };
        // Heads, in both classes; one that waits without a slab; a body that goes on bringing something.
        deadlines.set_keeping(0, &deadlines.head(), 0);
        deadlines.set_keeping(1, &deadlines.head(), 1);
        deadlines.set_keeping(2, &deadlines.head(), 1);
        deadlines.set(3, &deadlines.idle(), Cut::Reading);
        let mut pace = deadlines.body(0);
        deadlines.set_keeping(4, &pace, 1);
        assert_eq!(expired_beside(1_000, &[9, 9]), [0_usize; 0]);
        deadlines.came(&mut pace, 20_000);
        deadlines.set_keeping(4, &pace, 1);
        assert_eq!(expired_beside(1_200, &[0, 1]), [1]);
        assert_eq!(expired_beside(1_200, &[0, 0]), [0_usize; 0]);
        assert_eq!(expired_beside(1_200, &[2, 2]), [0, 2]);
        assert_eq!(expired_beside(2_000, &[9, 9]), [0_usize; 0]);
        assert_eq!(expired_beside(2_200, &[9, 9]), [4]);
        assert_eq!(expired_beside(2_200, &[9, 9]), [0_usize; 0]);
    }

    /// The deadlines of a body that brings `size` bytes every `every` milliseconds: when it expires, from its start.
    fn ends(size: usize, every: Millis) -> Millis {
        let deadlines = deadlines();
        let mut pace = deadlines.body(0);
        let mut now = 0;
        loop {
            let next = now + every;
            if pace.at <= next {
                return pace.at;
            }
            now = next;
            let _ = expired(&deadlines, now);
            deadlines.came(&mut pace, size);
        }
    }

    #[test]
    fn a_body_has_to_begin_then_to_keep_its_rate_and_to_end() {
        // Nothing comes.
        assert_eq!(ends(1, 30_000), 20_100);
        // One byte a second: the window that its first byte opened.
        assert_eq!(ends(1, 1_000), 1_000 + 10_100);
        // Just below the least rate, and just at it, in small and in large pieces.
        assert_eq!(ends(1_000, 1_000), 1_000 + 10_100);
        assert_eq!(ends(1_025, 1_000), 120_100);
        assert_eq!(ends(103, 100), 120_100);
        assert_eq!(ends(11_000, 10_000), 120_100);
        // Fast, and still too long.
        assert_eq!(ends(1 << 20, 10), 120_100);
        // What came with the head has begun it.
        assert_eq!(deadlines().body(1).at, 10_100);
    }

    #[test]
    fn a_head_has_one_deadline_however_it_trickles() {
        let deadlines = deadlines();
        let mut pace = deadlines.head();
        let before = pace;
        let _ = expired(&deadlines, 5_000);
        deadlines.came(&mut pace, 4_000);
        assert_eq!(pace, before);
    }

    #[test]
    fn a_wait_that_is_not_the_peers_fault_costs_it_nothing() {
        let deadlines = deadlines();
        for (mut pace, least) in [(deadlines.head(), 10_100), (deadlines.body(0), 20_100)] {
            let end = pace.end;
            deadlines.resume(&mut pace, deadlines.pause());
            assert_eq!((pace.at, pace.end), (least, end), "nothing was waited for");
            // Up to a period longer than the sweeps say.
            let pause = deadlines.pause();
            let began = deadlines.now.get();
            let _ = expired(&deadlines, began + 60_000);
            deadlines.resume(&mut pace, pause);
            assert_eq!(
                (pace.at, pace.end),
                (least + 60_100, end + 60_100),
                "as long as there was left"
            );
            deadlines.now.set(0);
        }
    }
}
