//! The configuration file: whatever it holds, there are places for its errors, or it is valid and adds up.

use std::path::Path;

use weir::budget::Budget;
use weir::config::Config;

pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let parse = || Config::parse(text, Path::new("fuzz.toml"), Path::new("/nowhere"));
    match parse() {
        Ok(config) => {
            assert_eq!(parse().ok().as_ref(), Some(&config));
            assert!(!config.listeners.is_empty() && !config.routes.is_empty());
            for route in &config.routes {
                assert!(route.table_index < config.tables.len());
            }
            let lists = config.routes.iter().map(|route| &route.principals);
            let lists = lists.chain(config.listeners.iter().map(|listener| &listener.principals));
            for index in lists.flatten().flatten() {
                assert!(*index < config.principals.len());
            }
            assert!(Budget::new(&config).total_size() > 0);
            let _ = config.warnings();
        }
        Err(errors) => {
            assert!(!errors.errors.is_empty());
            let line_count = text.split('\n').count();
            for error in &errors.errors {
                assert!((1..=line_count).contains(&error.line), "{errors}");
                let line = text.split('\n').nth(error.line - 1).unwrap_or_default();
                let columns = 1..=line.chars().count() + 1;
                assert!(columns.contains(&error.column), "{errors}");
            }
            assert_eq!(
                errors.to_string().lines().count(),
                errors.errors.len(),
                "{errors:?}"
            );
        }
    }
}
