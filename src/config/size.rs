//! Sizes in text: `"8MiB"` to bytes and back.
//!
//! Strict on purpose: binary units only, whole numbers only, one spelling each.
//! A size that reads as eight megabytes to one person and as eight mebibytes to another is refused.

use std::fmt;

const UNITS: [(&str, u64); 4] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// The text is not a size; the message says what one looks like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a size: write a whole number and B, KiB, MiB or GiB, such as \"8MiB\"{hint}")]
pub struct SizeInvalid {
    hint: String,
}

impl Size {
    /// Reads `"16KiB"`, `"8MiB"`, `"1GiB"`, `"512B"`.
    pub fn parse(text: &str) -> Result<Self, SizeInvalid> {
        let digits_size = text.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, unit_text) = text.split_at(digits_size);
        let invalid = || SizeInvalid {
            hint: match unit_text.trim().to_ascii_uppercase().as_str() {
                _ if digits.is_empty() => String::new(),
                "K" | "KB" | "KIB" => format!("; did you mean \"{digits}KiB\"?"),
                "M" | "MB" | "MIB" => format!("; did you mean \"{digits}MiB\"?"),
                "G" | "GB" | "GIB" => format!("; did you mean \"{digits}GiB\"?"),
                _ => String::new(),
            },
        };
        let (_, unit) = UNITS
            .iter()
            .find(|(name, _)| *name == unit_text)
            .ok_or_else(invalid)?;
        let count: u64 = digits.parse().map_err(|_| invalid())?;
        count.checked_mul(*unit).map(Self).ok_or_else(invalid)
    }
}

/// Exact, so that it can be pasted into a configuration; with a precision (`{:.2}`) rounded to read.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let divides = |unit: u64| self.0 > 0 && self.0.is_multiple_of(unit);
        let is_rounded = f.precision().is_some();
        let (name, unit) = UNITS
            .into_iter()
            .find(|(_, unit)| divides(*unit) || (is_rounded && self.0 >= *unit))
            .unwrap_or(("B", 1));
        if divides(unit) || unit == 1 {
            return write!(f, "{}{name}", self.0 / unit);
        }
        let precision = f.precision().unwrap_or_default();
        write!(f, "{:.precision$}{name}", self.0 as f64 / unit as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints() {
        for (text, size) in [
            ("0B", 0),
            ("18B", 18),
            ("16KiB", 16 << 10),
            ("8MiB", 8 << 20),
            ("1GiB", 1 << 30),
            ("1025B", 1025),
        ] {
            assert_eq!(Size::parse(text), Ok(Size(size)));
        }
        for size in [0, 1, 18, 1 << 10, 1028 << 10, 1_000_001, 8 << 20, 3 << 30] {
            assert_eq!(Size::parse(&Size(size).to_string()), Ok(Size(size)));
        }
    }

    #[test]
    fn rounds_only_when_asked_to() {
        for (size, exact, rounded) in [
            (0, "0B", "0B"),
            (1023, "1023B", "1023B"),
            (4 << 20, "4MiB", "4MiB"),
            (1280 << 10, "1280KiB", "1.25MiB"),
            (1_000_001, "1000001B", "976.56KiB"),
        ] {
            assert_eq!(Size(size).to_string(), exact);
            assert_eq!(format!("{:.2}", Size(size)), rounded);
        }
    }

    #[test]
    fn refuses_every_second_spelling() {
        for text in [
            "",
            "8",
            "MiB",
            "-8MiB",
            "+8MiB",
            "8 MiB",
            "8mib",
            "8MB",
            "8M",
            "1.5MiB",
            "8MiB ",
            "0x8MiB",
            "8TiB",
            "99999999999999999999B",
            "17179869184GiB",
        ] {
            assert!(Size::parse(text).is_err(), "{text:?} passed");
        }
    }

    #[test]
    fn says_what_was_meant() {
        for text in ["8MB", "8 MiB", "8m", "8mib"] {
            let message = Size::parse(text).unwrap_err().to_string();
            assert!(message.ends_with("did you mean \"8MiB\"?"), "{message}");
        }
    }
}
