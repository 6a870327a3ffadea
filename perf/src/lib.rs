//! The parts of the performance tool that tests of other packages use as well.
//!
//! [`event`]: events to send. [`kill`], behind the feature of that name: rounds of `kill -9`, with [`child`] for the
//! process that is killed.
//! With `default-features = false` only the events are left, and no dependency. The rest of the tool (client, server
//! under test, floors) is the binary.

pub mod event;

#[cfg(feature = "kill")]
pub mod child;
#[cfg(feature = "kill")]
pub mod kill;
