//! Records: the events of one request body.

pub mod json;
