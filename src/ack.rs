//! Acknowledgement: which rows are durable, which are delivered, and who waits to say so.
//!
//! Before it: [`crate::encoder`] has put a request's rows into an upload buffer, and says up to which row.
//! After it: [`crate::connection`] answers, once the promise of the route is kept.
//! Thread: one reactor. Allocates: once, for as many waiters as there may be requests.
//! Invariant: rows of a table are counted from the start of the process and settle in that order; a request is only
//! acknowledged when its last row is.
//! Not here: how rows become durable ([`crate::commit`]) or delivered ([`crate::uplink`]).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Instant;

use crate::config::{Ack, Table};
use crate::error::Refusal;

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    pub table_index: usize,
    /// The table's rows up to and including the request's last; 0 where it has none, so that there is nothing to wait for.
    pub position: u64,
    pub ack: Ack,
}

/// How far one table has come, in rows.
#[derive(Default)]
struct Progress {
    durable: u64,
    /// Rows up to here that were not durable at the time were in a commit that failed.
    failed: u64,
    delivered: u64,
    /// Rows up to here are not known to be delivered, and some of them never will be.
    undeliverable: u64,
    /// Batches with the uplink, oldest first: their last row, and whether they are delivered.
    /// Kept only for tables where somebody waits for delivery.
    in_uplink: VecDeque<(u64, bool)>,
}

struct Waiter {
    id: u64,
    ticket: Ticket,
    waker: Waker,
}

/// The acknowledgements of one core.
pub struct Acks {
    tables: RefCell<Vec<Progress>>,
    waiters: RefCell<Vec<Waiter>>,
    id_next: Cell<u64>,
}

/// Takes a waiter out of the books when its future ends early.
struct Registered<'a> {
    acks: &'a Acks,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut waiters = self.acks.waiters.borrow_mut();
        if let Some(index) = waiters.iter().position(|waiter| waiter.id == self.id) {
            waiters.swap_remove(index);
        }
    }
}

impl Acks {
    /// For up to `waiters_max` requests that wait, and `batches_max` batches that are not delivered.
    pub fn new(tables: &[Table], waiters_max: usize, batches_max: usize) -> Self {
        let progress = |table: &Table| Progress {
            in_uplink: VecDeque::with_capacity(if table.delivered { batches_max } else { 0 }),
            ..Progress::default()
        };
        Acks {
            tables: RefCell::new(tables.iter().map(progress).collect()),
            waiters: RefCell::new(Vec::with_capacity(waiters_max)),
            id_next: Cell::new(0),
        }
    }

    /// Completes when the ticket's promise is kept, or cannot be.
    pub async fn settled(&self, ticket: Ticket, deadline: Option<Instant>) -> Result<(), Refusal> {
        if let Some(outcome) = self.outcome(&ticket) {
            return outcome;
        }
        let id = self.id_next.get();
        self.id_next.set(id + 1);
        let registered = Registered { acks: self, id };
        let turn = poll_fn(|context| {
            if let Some(outcome) = self.outcome(&ticket) {
                return Poll::Ready(outcome);
            }
            let mut waiters = self.waiters.borrow_mut();
            match waiters.iter_mut().find(|waiter| waiter.id == id) {
                Some(waiter) => waiter.waker.clone_from(context.waker()),
                None => waiters.push(Waiter {
                    id,
                    ticket,
                    waker: context.waker().clone(),
                }),
            }
            Poll::Pending
        });
        match deadline {
            None => {
                let outcome = turn.await;
                // Who is woken is out of the books already.
                std::mem::forget(registered);
                outcome
            }
            Some(deadline) => tokio::time::timeout_at(deadline.into(), turn)
                .await
                .unwrap_or(Err(Refusal::AckTimeout)),
        }
    }

    fn outcome(&self, ticket: &Ticket) -> Option<Result<(), Refusal>> {
        let tables = self.tables.borrow();
        let progress = &tables[ticket.table_index];
        if ticket.ack == Ack::Delivered
            && ticket.position > 0
            && progress.undeliverable >= ticket.position
        {
            return Some(Err(Refusal::DeadLetter));
        }
        let kept = match ticket.ack {
            Ack::Memory => true,
            Ack::Durable => progress.durable >= ticket.position,
            Ack::Delivered => progress.delivered >= ticket.position,
        };
        if kept {
            Some(Ok(()))
        } else if progress.durable < ticket.position && progress.failed >= ticket.position {
            Some(Err(Refusal::StorageFault))
        } else {
            None
        }
    }

    /// The table's rows up to `position` are durable.
    pub fn durable(&self, table_index: usize, position: u64) {
        let mut tables = self.tables.borrow_mut();
        let durable = &mut tables[table_index].durable;
        *durable = position.max(*durable);
        drop(tables);
        self.wake(table_index);
    }

    /// Making the table's rows up to `position` durable has failed.
    pub fn failed(&self, table_index: usize, position: u64) {
        let mut tables = self.tables.borrow_mut();
        let failed = &mut tables[table_index].failed;
        *failed = position.max(*failed);
        drop(tables);
        self.wake(table_index);
    }

    /// A batch with the table's rows up to `position` is on its way; in the order of positions.
    pub fn sent(&self, table_index: usize, position: u64) {
        let mut tables = self.tables.borrow_mut();
        tables[table_index].in_uplink.push_back((position, false));
    }

    /// The batch that ended at `position` is delivered.
    pub fn delivered(&self, table_index: usize, position: u64) {
        let mut tables = self.tables.borrow_mut();
        let progress = &mut tables[table_index];
        if let Some(batch) = progress
            .in_uplink
            .iter_mut()
            .find(|(end, _)| *end == position)
        {
            batch.1 = true;
        }
        while let Some((end, true)) = progress.in_uplink.front() {
            progress.delivered = *end;
            progress.in_uplink.pop_front();
        }
        drop(tables);
        self.wake(table_index);
    }

    /// The batch that ended at `position` went to the dead letters. Whoever waits for it, or for a batch before it that is
    /// not delivered yet, is told so; later batches are acknowledged as ever.
    pub fn undeliverable(&self, table_index: usize, position: u64) {
        let mut tables = self.tables.borrow_mut();
        let undeliverable = &mut tables[table_index].undeliverable;
        *undeliverable = position.max(*undeliverable);
        drop(tables);
        self.wake(table_index);
        self.delivered(table_index, position);
    }

    /// Wakes everyone whose wait is over.
    fn wake(&self, table_index: usize) {
        let mut waiters = self.waiters.borrow_mut();
        let mut index = 0;
        while index < waiters.len() {
            let ticket = waiters[index].ticket;
            if ticket.table_index == table_index && self.outcome(&ticket).is_some() {
                waiters.swap_remove(index).waker.wake();
            } else {
                index += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_dead_letter_is_never_acknowledged_as_delivered_and_stops_nobody_behind() {
        let mut tables = Config::default().tables;
        tables[0].delivered = true;
        let acks = Acks::new(&tables, 4, 4);
        let outcome = |position| {
            acks.outcome(&Ticket {
                table_index: 0,
                position,
                ack: Ack::Delivered,
            })
        };
        for end in [10, 20, 30] {
            acks.sent(0, end);
        }
        acks.durable(0, 30);
        acks.delivered(0, 10);
        assert_eq!((outcome(10), outcome(20)), (Some(Ok(())), None));
        acks.undeliverable(0, 20);
        assert_eq!(outcome(20), Some(Err(Refusal::DeadLetter)));
        assert_eq!(outcome(30), None);
        acks.delivered(0, 30);
        assert_eq!(outcome(30), Some(Ok(())));
        assert_eq!(outcome(20), Some(Err(Refusal::DeadLetter)));
        assert_eq!(outcome(0), Some(Ok(())), "a request without rows");
        // What it is durable for stays so.
        let durable = Ticket {
            table_index: 0,
            position: 20,
            ack: Ack::Durable,
        };
        assert_eq!(acks.outcome(&durable), Some(Ok(())));
    }
}
