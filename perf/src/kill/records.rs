//! What is sent: records with a unique id, whose bytes follow from the seed and that id alone.
//!
//! Before it: nothing. After it: [`super::sender`] posts these, [`super::judge`] makes them again and compares.
//! Thread: any; pure functions. Allocates the text it returns.
//! Invariant: equal arguments give equal bytes, so nothing has to be remembered to check a record.
//! Not here: who sent which record, and how often.

use crate::event::Random;
use std::fmt::Write;

/// A table of the configuration.
#[derive(Debug)]
pub struct Table {
    pub path: &'static str,
    pub name: &'static str,
    /// Whether its rows are in the fluent-bit envelope; else they are the records themselves.
    pub enveloped: bool,
}

pub const DATABASE: &str = "Telemetry";

pub const TABLES: [Table; 2] = [
    Table {
        path: "/events",
        name: "Events",
        enveloped: true,
    },
    Table {
        path: "/audit",
        name: "Audit",
        enveloped: false,
    },
];

/// No record is longer than this; it fits the `limits.record` of the configuration.
pub const RECORD_SIZE_MAX: usize = 60 << 10;

/// Who made a record, and the how manieth of that sender's it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordId {
    pub sender: usize,
    pub number: u64,
}

impl std::fmt::Display for RecordId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "s{}-{}", self.sender, self.number)
    }
}

impl RecordId {
    /// The id in a record, or in a row.
    pub fn find(row: &str) -> Option<RecordId> {
        let (_, rest) = row.split_once("{\"id\":\"s")?;
        let (id, _) = rest.split_once('"')?;
        let (sender, number) = id.split_once('-')?;
        Some(RecordId {
            sender: sender.parse().ok()?,
            number: number.parse().ok()?,
        })
    }
}

/// A record, compact: what weir stores of it byte for byte.
pub fn record(seed: u64, id: RecordId, is_large: bool) -> String {
    let mut random = Random::of(seed, ((id.sender as u64) << 40) | id.number);
    let pad_size = if is_large {
        (16 << 10) + random.below(40 << 10)
    } else {
        20 + random.below(240)
    };
    let mut text = String::with_capacity(pad_size as usize + 64);
    let _ = write!(text, "{{\"id\":\"{id}\",\"pad\":\"");
    let begin = text.len();
    while text.len() < begin + pad_size as usize {
        let _ = write!(text, "{:016x}", random.next());
    }
    text.push_str("\"}");
    debug_assert!(text.len() <= RECORD_SIZE_MAX);
    text
}

/// The record in a row of the table; `None` where what is around it is not what it should be.
pub fn unwrap_row<'a>(table: &Table, row: &'a str) -> Option<&'a str> {
    const TIMESTAMP_SIZE: usize = "2026-11-23T09:15:02.123Z".len();
    if !table.enveloped {
        return Some(row);
    }
    let rest = row.strip_prefix("{\"timestamp\":\"")?;
    let (_timestamp, rest) = rest.split_at_checked(TIMESTAMP_SIZE)?;
    let rest = rest.strip_prefix("\",\"tag\":\"")?;
    let rest = rest.strip_prefix(table.path.strip_prefix('/')?)?;
    rest.strip_prefix("\",\"log\":")?.strip_suffix('}')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RecordId = RecordId {
        sender: 3,
        number: 41,
    };

    #[test]
    fn a_record_is_a_function_of_seed_and_id_and_names_its_id() {
        for is_large in [false, true] {
            let text = record(7, ID, is_large);
            assert_eq!(text, record(7, ID, is_large));
            assert_ne!(text, record(8, ID, is_large));
            assert_eq!(RecordId::find(&text), Some(ID));
            assert_eq!(text, crate::event::compact(&text));
            assert!(text.len() <= RECORD_SIZE_MAX);
            assert_eq!(text.len() > 16 << 10, is_large);
        }
        assert_eq!(RecordId::find("{\"id\":\"s3-\"}"), None);
        assert_eq!(RecordId::find("{\"id\":\"3-1\"}"), None);
    }

    #[test]
    fn a_row_is_unwrapped_only_where_all_around_the_record_is_right() {
        let [events, audit] = &TABLES;
        let row =
            "{\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"events\",\"log\":{\"a\":1}}";
        assert_eq!(unwrap_row(events, row), Some("{\"a\":1}"));
        assert_eq!(unwrap_row(audit, row), Some(row));
        assert_eq!(unwrap_row(events, &row.replace("events", "audit")), None);
        assert_eq!(unwrap_row(events, &row[..row.len() - 1]), Some("{\"a\":1"));
        assert_eq!(unwrap_row(events, "{\"a\":1}"), None);
    }
}
