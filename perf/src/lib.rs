//! The parts of the performance tool that other binaries can use: events to send, and a weir as a child process.
//!
//! With `default-features = false` only the events are left, and no dependency.
//! The rest of the tool (client, server under test, floors) is the binary.

pub mod event;

#[cfg(feature = "tool")]
pub mod child;
