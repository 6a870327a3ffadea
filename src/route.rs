//! Routes: from a request's path to the table its records go to.
//!
//! Comes after the head is parsed and before the body is read: no route, no body.
//! Each reactor has its own copy. Building allocates; [`Routes::find`] does not.
//!
//! An exact path wins over every prefix, a longer prefix over a shorter one; `/*` is the shortest.
//! Paths are compared byte for byte: nothing is decoded and nothing normalised, so two spellings
//! of one path are two paths, and a route can't be reached by a spelling that was not configured.
//!
//! Not here: the tag, which is made of the path too, and which paths are well-formed.

use crate::config::{Config, PathPattern, Route};

/// The routes of a configuration, in an order made for finding.
#[derive(Clone, Debug)]
pub struct Routes {
    /// Sorted by path.
    exact: Box<[Entry]>,
    /// Longest first.
    prefix: Box<[Entry]>,
}

#[derive(Clone, Debug)]
struct Entry {
    path: Box<[u8]>,
    /// In the order of the configuration.
    index: usize,
    route: Route,
}

impl Routes {
    pub fn new(config: &Config) -> Self {
        let mut exact = Vec::new();
        let mut prefix = Vec::new();
        for (index, route) in config.routes.iter().enumerate() {
            let (list, path) = match &route.pattern {
                PathPattern::Exact(path) => (&mut exact, path),
                PathPattern::Prefix(path) => {
                    assert!(path.ends_with('/'), "a prefix ends at a segment");
                    (&mut prefix, path)
                }
            };
            list.push(Entry {
                path: path.as_bytes().into(),
                index,
                route: route.clone(),
            });
        }
        exact.sort_by(|a: &Entry, b| a.path.cmp(&b.path));
        prefix.sort_by_key(|entry: &Entry| std::cmp::Reverse(entry.path.len()));
        Self {
            exact: exact.into(),
            prefix: prefix.into(),
        }
    }

    /// The route of `path`, which is the request's target up to its query, and its place in the configuration.
    pub fn find(&self, path: &[u8]) -> Option<(usize, &Route)> {
        let found = match self.exact.binary_search_by(|entry| (*entry.path).cmp(path)) {
            Ok(index) => Some(&self.exact[index]),
            Err(_) => self
                .prefix
                .iter()
                .find(|entry| path.starts_with(&entry.path)),
        };
        found.map(|entry| (entry.index, &entry.route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Routes to tables named `0`, `1`, … in the order given.
    fn routes(paths: &[&str]) -> Routes {
        let text: String = paths
            .iter()
            .enumerate()
            .map(|(index, path)| format!("[[route]]\npath = \"{path}\"\ntable = \"{index}\"\n"))
            .collect();
        let config = Config::parse(&text, Path::new("test.toml"), Path::new("")).unwrap();
        Routes::new(&config)
    }

    #[track_caller]
    fn assert_finds(routes: &Routes, path: &str, expected: Option<usize>) {
        let found = routes.find(path.as_bytes());
        assert_eq!(found.map(|(index, _)| index), expected, "{path}");
        let table_index = found.map(|(_, route)| route.table_index);
        assert_eq!(table_index, expected, "{path}");
    }

    #[test]
    fn exact_wins_then_the_longest_prefix() {
        for paths in [
            ["/*", "/a/*", "/a/b/*", "/a/b/c", "/a/b"],
            // The order of the file is of no account.
            ["/a/b", "/a/b/c", "/a/b/*", "/a/*", "/*"],
        ] {
            let routes = routes(&paths);
            for (path, pattern) in [
                ("/", "/*"),
                ("/x", "/*"),
                ("/a", "/*"),
                ("/ab", "/*"),
                ("/a/", "/a/*"),
                ("/a/x/y", "/a/*"),
                ("/a/b", "/a/b"),
                ("/a/b/", "/a/b/*"),
                ("/a/bc", "/a/*"),
                ("/a/b/c", "/a/b/c"),
                ("/a/b/c/", "/a/b/*"),
                ("/a/b/cd", "/a/b/*"),
            ] {
                let expected = paths.iter().position(|known| *known == pattern);
                assert_finds(&routes, path, expected);
            }
        }
    }

    #[test]
    fn without_a_catch_all_there_is_no_route() {
        let routes = routes(&["/prefix/*", "/exact"]);
        assert_finds(&routes, "/prefix/x", Some(0));
        assert_finds(&routes, "/prefix/x/y", Some(0));
        assert_finds(&routes, "/exact", Some(1));
        for path in [
            "",
            "/",
            "*",
            "/prefix",
            "/prefixed",
            "/prefixed/x",
            "/exact/",
            "/exactly",
            "/Exact",
            "/%65xact",
            "prefix/x",
            "//prefix/x",
        ] {
            assert_finds(&routes, path, None);
        }
    }

    #[test]
    fn agrees_with_a_naive_search() {
        let paths = ["/a/*", "/a/a/*", "/b", "/a/b", "/b/*", "/a/a/a/*", "/a"];
        let routes = routes(&paths);
        let naive = |path: &str| {
            let specificity = |pattern: &str| match pattern.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix).then_some(prefix.len()),
                None => (path == pattern).then_some(usize::MAX),
            };
            (0..paths.len())
                .filter(|index| specificity(paths[*index]).is_some())
                .max_by_key(|index| specificity(paths[*index]))
        };
        // Every path of up to seven bytes over this alphabet.
        for length in 0..=7u32 {
            for number in 0..3usize.pow(length) {
                let path: String = (0..length)
                    .map(|digit| ['/', 'a', 'b'][number / 3usize.pow(digit) % 3])
                    .collect();
                assert_finds(&routes, &path, naive(&path));
            }
        }
    }
}
