//! Events to send: the part of the performance tool that tests of other packages use as well.
//!
//! The tool itself (client, server under test, floors) is the binary; this library has no dependencies,
//! so that `default-features = false` costs a test build nothing.

pub mod event;
