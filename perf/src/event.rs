//! Generated events: one large shape, one small shape, and the small shape as NDJSON.
//!
//! Everything downstream (request pools, floor B, tests) starts from these bytes.
//! Allocates freely: events are made before a measurement, never during one.
//!
//! Invariant: the bytes are a pure function of `(seed, index)`, on every machine.
//! What the values mean is invented; what matters is size, line count, depth, and how much of an event repeats
//! (inside itself, and from one event to the next), because that decides what parsing and compression cost.
//! Not here: malformed bodies; those belong to the tests that expect them refused.

use std::fmt::Write;

/// Workflow entries in a large event; nearly all of its bytes are in them.
pub const WORKFLOW_COUNT: usize = 320;

/// Events in one NDJSON body of the measurements.
pub const NDJSON_LINES: usize = 1_000;

const STAGES: [&str; 8] = [
    "PreMerge",
    "PostMerge",
    "Nightly",
    "Release",
    "Smoke",
    "Endurance",
    "Packaging",
    "Compliance",
];

/// With a stage in front these name the workflows, so they must differ from each other.
const SUBJECTS: [&str; 40] = [
    "Harbor",
    "Ledger Reader",
    "Tide Gauge Calibration",
    "Sluice",
    "Sluice Gate Timing",
    "Reservoir Level Forecast",
    "Culvert",
    "Python Bindings",
    "Python Bindings Typing",
    "Java Connector",
    "Java Connector Backpressure",
    "Go Agent",
    "Rust Core",
    "Rust Core Address Sanitizer",
    "Turbine Telemetry Schema",
    "Lock Keeper",
    "Lock Keeper Failover Drill",
    "Barge Scheduling",
    "Flood Map Rendering",
    "Rain Radar Import",
    "Silt Survey",
    "Pump Station Firmware",
    "Dredger Route Planner",
    "Water Rights Registry",
    "Spillway Alarm Relay",
    "Gauge Archive Compaction",
    "Estuary Salinity Model Training",
    "Fish Ladder Counter",
    "Ice Watch",
    "Ice Watch Thermal Camera",
    "Documentation Site",
    "Documentation Links",
    "Container Images",
    "Container Images Arm",
    "Helm Charts",
    "License Headers",
    "Dependency Review",
    "Translation Catalogs",
    "Load Test Against Staging Cluster",
    "Canary Promotion",
];

const SERVICES: [&str; 6] = [
    "intake-gate",
    "tide-board",
    "lock-desk",
    "pump-watch",
    "silt-probe",
    "rain-relay",
];

const ACTIONS: [&str; 6] = [
    "opened", "closed", "raised", "shifted", "checked", "drained",
];

const LEVELS: [&str; 4] = ["info", "warn", "note", "crit"];

/// SplitMix64: one multiplication chain per number, and any state is a good start.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn of(seed: u64, index: u64) -> Self {
        // Two rounds apart, so that (1, 2) and (2, 1) do not meet.
        let mut seeded = Random(seed);
        let mut indexed = Random(seeded.next() ^ index.wrapping_mul(0x9E6D_62D0_6F6A_9A9B));
        Random(indexed.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number of exactly `digits` decimal digits, so that no event is longer than another.
    fn decimal(&mut self, digits: u32) -> u64 {
        let low = 10u64.pow(digits - 1);
        low + self.below(9 * low)
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }

    fn hex(&mut self, digits: usize) -> String {
        let mut text = String::with_capacity(digits + 16);
        while text.len() < digits {
            let _ = write!(text, "{:016x}", self.next());
        }
        text.truncate(digits);
        text
    }

    fn uuid(&mut self) -> String {
        format!(
            "{}-{}-4{}-a{}-{}",
            self.hex(8),
            self.hex(4),
            self.hex(3),
            self.hex(3),
            self.hex(12)
        )
    }
}

/// `seconds` since 1970 as `2026-11-23T09:15:02` (UTC, no zone suffix, years 1970 to 9999).
pub fn timestamp_utc(seconds: u64) -> String {
    // Days to civil date in the era arithmetic of 400-year cycles that start on 1 March.
    let day = seconds / 86_400 + 719_468;
    let era = day / 146_097;
    let day_of_era = day % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let second_of_day = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day_of_month:02}T{:02}:{:02}:{:02}",
        second_of_day / 3_600,
        second_of_day / 60 % 60,
        second_of_day % 60
    )
}

/// 2026-01-01T00:00:00Z; events are spread over the 28 million seconds after it.
const EPOCH_SECONDS: u64 = 1_767_225_600;

/// One large event, pretty-printed with four spaces: 187 KB, 4,539 lines, depth 4.
///
/// Identifiers, hashes, UUIDs and times differ for every `(seed, index)`, also from one workflow of the event to the
/// next; the names repeat, in an order that starts elsewhere each time.
pub fn large_event(seed: u64, index: u64) -> String {
    let mut random = Random::of(seed, index);
    let seconds = EPOCH_SECONDS + random.below(28_000_000);
    let mut text = String::with_capacity(190_000);

    // Writing to a String cannot fail, so the results below carry nothing.
    let _ = write!(
        text,
        r#"{{
    "timestamp": "{time}.{fraction:07}Z",
    "runner": {{
        "environment": "rehearsal",
        "hostname": "gate-runner-{host}-{pod}"
    }},
    "canal": {{
        "job_id": "{shard}-{job}:north",
        "original_job_id": "{shard}-{job}:north",
        "queue": "sluices"
    }},
    "event": {{
        "request_id": "{request}",
        "delivery_id": "{delivery}",
        "origin_time": {{
            "seconds": {seconds},
            "nanos": {nanos}
        }},
        "name": "pipeline_run",
        "action": "completed"
    }},
    "repository": {{
        "id": {repository},
        "global_id": "R_{repository_global}",
        "name": "locks",
        "full_name": "waterworks/locks"
    }},
"#,
        time = timestamp_utc(seconds),
        fraction = random.below(10_000_000),
        host = random.hex(10),
        pod = random.hex(5),
        shard = random.decimal(2),
        job = random.uuid(),
        request = random.uuid(),
        delivery = random.uuid(),
        nanos = random.decimal(9),
        repository = random.decimal(9),
        repository_global = random.hex(10),
    );

    let person_id = random.decimal(7);
    let person_global = random.hex(10);
    for role in ["owner", "executing_actor", "triggering_actor"] {
        let _ = write!(
            text,
            r#"    "{role}": {{
        "id": {person_id},
        "global_id": "U_{person_global}",
        "login": "lockkeeper",
        "type": "User"
    }},
"#
        );
    }

    text.push_str(
        r#"    "error": null,
    "outcome": {
        "result": 3,
        "details": "No pipeline had to run"
    },
    "workflows": {
"#,
    );
    let first = random.below(WORKFLOW_COUNT as u64) as usize;
    for position in 0..WORKFLOW_COUNT {
        // Run identifier and hash are new to the compressor; the path repeats the identifier's.
        let name = (first + position) % WORKFLOW_COUNT;
        let identifier = format!(
            "{} {} {}",
            STAGES[name / SUBJECTS.len()],
            SUBJECTS[name % SUBJECTS.len()],
            random.hex(8)
        );
        let path = format!(".pipelines/locks/{}.yml", identifier.replace(' ', "_"));
        let sha = random.hex(40);
        let separator = if position + 1 < WORKFLOW_COUNT {
            ","
        } else {
            ""
        };
        let _ = write!(
            text,
            r#"        "{path}": {{
            "identifier": "{identifier}",
            "path": "{path}",
            "sha": "{sha}",
            "outcome": {{
                "result": 3,
                "details": "pipeline set aside"
            }},
            "filter": {{
                "is_filtered_out": true,
                "type": "event",
                "reason": "pipeline ignores this event"
            }}
        }}{separator}
"#
        );
    }

    let _ = write!(
        text,
        r#"    }},
    "resolved": {{
        "event_commit_sha": "{event_sha}",
        "event_commit_ref": "refs/heads/mainline",
        "checkout_commit_sha": "{checkout_sha}",
        "checkout_commit_ref": "refs/heads/mainline"
    }}
}}"#,
        event_sha = random.hex(40),
        checkout_sha = random.hex(40),
    );
    text
}

/// One small event: a JSON object on one line, about 153 bytes, without a line end.
pub fn small_event(seed: u64, index: u64) -> String {
    let mut random = Random::of(seed, index);
    format!(
        r#"{{"timestamp":"{}Z","event":"gate.{}","message":"Gate {}/{}","level":"{}","service":"{}-{}"}}"#,
        timestamp_utc(EPOCH_SECONDS + random.below(28_000_000)),
        random.pick(&ACTIONS),
        random.decimal(4),
        random.hex(32),
        random.pick(&LEVELS),
        random.pick(&SERVICES),
        random.decimal(2),
    )
}

/// `lines` small events, one per line, each line ended.
///
/// Index `i` of a body holds other events than index `j`, as long as both have the same number of lines.
pub fn ndjson(seed: u64, index: u64, lines: usize) -> String {
    let mut text = String::with_capacity(lines * 170);
    for line in 0..lines as u64 {
        text.push_str(&small_event(seed, index * lines as u64 + line));
        text.push('\n');
    }
    text
}

/// The same JSON text without the white space between its tokens. The input must be valid JSON.
pub fn compact(json: &str) -> String {
    let mut compacted = String::with_capacity(json.len());
    let mut in_string = false;
    let mut escaped = false;
    for character in json.chars() {
        if in_string {
            compacted.push(character);
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
        } else if !matches!(character, ' ' | '\t' | '\n' | '\r') {
            compacted.push(character);
            in_string = character == '"';
        }
    }
    compacted
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::HashSet;

    fn depth(value: &Value) -> usize {
        match value {
            Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
            Value::Array(elements) => 1 + elements.iter().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }

    #[test]
    fn large_event_has_the_size_the_lines_and_the_depth_it_promises() {
        for index in 0..20 {
            let text = large_event(7, index);
            assert!((186_000..=188_000).contains(&text.len()), "{}", text.len());
            assert_eq!(text.lines().count(), 4_539);
            let compacted = compact(&text);
            assert!(
                (120_000..=122_000).contains(&compacted.len()),
                "{}",
                compacted.len()
            );
            let value: Value = serde_json::from_str(&text).expect("valid JSON");
            assert_eq!(depth(&value), 4);
            let workflows = value["workflows"].as_object().expect("an object");
            assert_eq!(workflows.len(), WORKFLOW_COUNT, "names must not collide");
        }
    }

    #[test]
    fn small_event_is_one_line_near_its_nominal_size() {
        let mut total = 0;
        for index in 0..1_000 {
            let text = small_event(7, index);
            assert!((143..=163).contains(&text.len()), "{}: {text}", text.len());
            assert!(!text.contains('\n'));
            assert!(
                serde_json::from_str::<Value>(&text)
                    .expect("valid JSON")
                    .is_object()
            );
            total += text.len();
        }
        assert!((151..=155).contains(&(total / 1_000)), "{}", total / 1_000);
    }

    #[test]
    fn ndjson_is_the_small_events_in_order() {
        let body = ndjson(7, 3, NDJSON_LINES);
        assert!(body.ends_with('\n'));
        assert_eq!(body.lines().count(), NDJSON_LINES);
        assert_eq!(
            body.lines().nth(5),
            Some(small_event(7, 3 * NDJSON_LINES as u64 + 5).as_str())
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        assert_eq!(large_event(1, 2), large_event(1, 2));
        assert_eq!(small_event(1, 2), small_event(1, 2));
        assert_eq!(ndjson(1, 2, 10), ndjson(1, 2, 10));
    }

    #[test]
    fn every_seed_and_index_gives_other_identifiers() {
        let mut seen = HashSet::new();
        for (seed, index) in [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)] {
            let value: Value = serde_json::from_str(&large_event(seed, index)).expect("valid JSON");
            assert!(seen.insert(value["timestamp"].to_string()));
            assert!(seen.insert(value["event"]["request_id"].to_string()));
            for workflow in value["workflows"].as_object().expect("an object").values() {
                assert!(seen.insert(workflow["sha"].to_string()));
            }
        }
        let small: HashSet<String> = (0..10_000).map(|index| small_event(0, index)).collect();
        assert_eq!(small.len(), 10_000);
    }

    #[test]
    fn compact_keeps_what_is_inside_strings() {
        assert_eq!(
            compact("{ \"a b\" :\t\"c \\\" d\\\\\" , \"e\": [ 1 ,\r\n2 ] }"),
            "{\"a b\":\"c \\\" d\\\\\",\"e\":[1,2]}"
        );
        let text = large_event(0, 0);
        let before: Value = serde_json::from_str(&text).expect("valid JSON");
        let after: Value = serde_json::from_str(&compact(&text)).expect("valid JSON");
        assert_eq!(before, after);
    }

    #[test]
    fn timestamps_follow_the_calendar() {
        assert_eq!(timestamp_utc(0), "1970-01-01T00:00:00");
        assert_eq!(timestamp_utc(951_782_400), "2000-02-29T00:00:00");
        assert_eq!(timestamp_utc(EPOCH_SECONDS), "2026-01-01T00:00:00");
        assert_eq!(timestamp_utc(EPOCH_SECONDS - 1), "2025-12-31T23:59:59");
    }
}
