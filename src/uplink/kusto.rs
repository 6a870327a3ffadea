//! Kusto.
pub mod trusted;
