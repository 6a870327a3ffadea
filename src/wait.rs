//! Waiting on one core for something another task of the same core will free.
//!
//! Before it: a task that found no free slab, no free upload buffer, or the encoder taken.
//! After it: whoever frees one calls [`WaitQueue::wake_one`].
//! Thread: one reactor; it is not `Sync`, there is no lock and no atomic.
//! Allocates: the queue, once, for as many waiters as the core may have requests.
//! Invariant: first come, first served: nobody takes what is freed while somebody else has waited longer.
//! Not here: waking across threads (`tokio::sync::Notify` does that).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

struct Waiter {
    ticket: u64,
    waker: Waker,
}

/// A first-in, first-out queue of tasks of one core.
pub struct WaitQueue {
    waiters: RefCell<VecDeque<Waiter>>,
    waiters_max: usize,
    /// Woken, but not yet run: newcomers still queue behind them.
    woken_count: Cell<usize>,
    ticket_next: Cell<u64>,
}

/// Takes the waiter out of the books however its future ends.
struct Place<'a> {
    queue: &'a WaitQueue,
    ticket: u64,
    served: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiters = self.queue.waiters.borrow_mut();
        let queued = waiters
            .iter()
            .position(|waiter| waiter.ticket == self.ticket);
        match queued {
            Some(index) => {
                waiters.remove(index);
            }
            None => {
                self.queue.woken_count.set(self.queue.woken_count.get() - 1);
                drop(waiters);
                if !self.served {
                    // It was woken for something that it leaves behind: pass the turn on.
                    self.queue.wake_one();
                }
            }
        }
    }
}

impl WaitQueue {
    /// A queue for at most `waiters_max` tasks, allocated now.
    pub fn new(waiters_max: usize) -> Self {
        WaitQueue {
            waiters: RefCell::new(VecDeque::with_capacity(waiters_max)),
            waiters_max,
            woken_count: Cell::new(0),
            ticket_next: Cell::new(0),
        }
    }

    /// How many tasks wait now.
    pub fn waiting_count(&self) -> usize {
        self.waiters.borrow().len() + self.woken_count.get()
    }

    /// Wakes the task that has waited longest, if there is one.
    pub fn wake_one(&self) {
        let waiter = self.waiters.borrow_mut().pop_front();
        if let Some(waiter) = waiter {
            self.woken_count.set(self.woken_count.get() + 1);
            waiter.waker.wake();
        }
    }

    /// Runs `attempt` until it gives something, in the order of arrival.
    /// `None` when `deadline` passes first, or when `waiters_max` tasks wait already; no deadline waits for ever.
    pub async fn until<T>(
        &self,
        deadline: Option<Instant>,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if self.waiting_count() == 0 {
            if let Some(taken) = attempt() {
                return Some(taken);
            }
        } else if self.waiting_count() >= self.waiters_max {
            return None;
        }
        let ticket = self.ticket_next.get();
        self.ticket_next.set(ticket + 1);
        // The place begins as "woken": the first poll below puts it into the queue.
        self.woken_count.set(self.woken_count.get() + 1);
        let mut place = Place {
            queue: self,
            ticket,
            served: false,
        };
        let mut first_poll = true;
        let turn = poll_fn(|context| {
            let mut waiters = self.waiters.borrow_mut();
            if let Some(waiter) = waiters.iter_mut().find(|waiter| waiter.ticket == ticket) {
                waiter.waker.clone_from(context.waker());
                return Poll::Pending;
            }
            drop(waiters);
            if !first_poll && let Some(taken) = attempt() {
                return Poll::Ready(taken);
            }
            let waiter = Waiter {
                ticket,
                waker: context.waker().clone(),
            };
            let mut waiters = self.waiters.borrow_mut();
            self.woken_count.set(self.woken_count.get() - 1);
            if first_poll {
                waiters.push_back(waiter);
            } else {
                // Woken in vain: it keeps its seniority.
                waiters.push_front(waiter);
            }
            first_poll = false;
            Poll::Pending
        });
        let taken = match deadline {
            None => Some(turn.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), turn).await.ok(),
        };
        place.served = taken.is_some();
        taken
    }
}

/// A bell for one task: it wakes who waits, or the next who comes to wait.
#[derive(Default)]
pub struct Bell {
    rung: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

impl Bell {
    pub fn ring(&self) {
        self.rung.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Completes once it was rung since the last time. Only one task may wait.
    pub async fn rung(&self) {
        poll_fn(|context| self.poll_rung(context)).await;
    }

    /// The same, for a task that waits for other things too.
    pub fn poll_rung(&self, context: &mut Context<'_>) -> Poll<()> {
        if self.rung.take() {
            return Poll::Ready(());
        }
        self.waker.set(Some(context.waker().clone()));
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;

    struct Counted {
        free: Cell<usize>,
        queue: WaitQueue,
    }

    impl Counted {
        fn take(&self) -> Option<()> {
            let free = self.free.get().checked_sub(1)?;
            self.free.set(free);
            Some(())
        }

        fn give(&self) {
            self.free.set(self.free.get() + 1);
            self.queue.wake_one();
        }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn waiters_are_served_in_the_order_they_came_and_newcomers_queue_behind() {
        run(async {
            let counted = Rc::new(Counted {
                free: Cell::new(0),
                queue: WaitQueue::new(8),
            });
            let order = Rc::new(RefCell::new(Vec::new()));
            let mut tasks = Vec::new();
            for index in 0..4 {
                let (counted, order) = (counted.clone(), order.clone());
                tasks.push(tokio::task::spawn_local(async move {
                    let taken = counted.queue.until(None, || counted.take()).await;
                    order.borrow_mut().push((index, taken.is_some()));
                }));
                tokio::task::yield_now().await;
            }
            assert_eq!(counted.queue.waiting_count(), 4);
            for _ in 0..4 {
                counted.give();
                // Freed, and the longest waiter has not run yet: a newcomer must not take it.
                let barging = counted
                    .queue
                    .until(Some(Instant::now()), || counted.take())
                    .await;
                assert_eq!(barging, None);
            }
            for task in tasks {
                task.await.unwrap();
            }
            assert_eq!(
                *order.borrow(),
                [(0, true), (1, true), (2, true), (3, true)]
            );
            assert_eq!(counted.queue.waiting_count(), 0);
            assert_eq!(counted.free.get(), 0);
        });
    }

    #[test]
    fn who_is_woken_in_vain_keeps_its_place() {
        run(async {
            let counted = Rc::new(Counted {
                free: Cell::new(0),
                queue: WaitQueue::new(8),
            });
            let order = Rc::new(RefCell::new(Vec::new()));
            for index in 0..3 {
                let (counted, order) = (counted.clone(), order.clone());
                tokio::task::spawn_local(async move {
                    counted.queue.until(None, || counted.take()).await;
                    order.borrow_mut().push(index);
                });
                tokio::task::yield_now().await;
            }
            counted.queue.wake_one();
            tokio::task::yield_now().await;
            assert_eq!(counted.queue.waiting_count(), 3);
            for _ in 0..3 {
                counted.give();
                tokio::task::yield_now().await;
            }
            assert_eq!(*order.borrow(), [0, 1, 2]);
        });
    }

    #[test]
    fn a_deadline_ends_the_wait_and_leaves_no_trace() {
        run(async {
            let queue = WaitQueue::new(2);
            let deadline = Instant::now() + Duration::from_secs(5);
            let taken: Option<()> = queue.until(Some(deadline), || None).await;
            assert_eq!(taken, None);
            assert_eq!(queue.waiting_count(), 0);
        });
    }

    #[test]
    fn a_full_queue_refuses_at_once() {
        run(async {
            let queue = Rc::new(WaitQueue::new(1));
            let waiter = {
                let queue = queue.clone();
                tokio::task::spawn_local(async move { queue.until(None, || None::<()>).await })
            };
            tokio::task::yield_now().await;
            assert_eq!(queue.until(None, || Some(1)).await, None);
            waiter.abort();
            assert!(waiter.await.unwrap_err().is_cancelled());
            assert_eq!(queue.until(None, || Some(1)).await, Some(1));
        });
    }
}
