//! Links between documents, and the files that they name.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::{documents, read, root};

/// Targets of the links of a document that are files of the repository.
fn links(document: &Path) -> Vec<String> {
    let text = read(document);
    let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let links = links.filter(|link| !link.contains("://") && !link.contains(char::is_whitespace));
    links.map(str::to_owned).collect()
}

/// The file that a link leads to, and its heading.
fn target(document: &Path, link: &str) -> (PathBuf, Option<String>) {
    let (path, heading) = match link.split_once('#') {
        Some((path, heading)) => (path, Some(heading.to_owned())),
        None => (link, None),
    };
    let path = match path {
        "" => document.to_owned(),
        path => document.parent().unwrap().join(path),
    };
    (path, heading)
}

/// The paths in a document: targets of relative links, and source files in backticks.
fn paths(document: &Path) -> Vec<PathBuf> {
    let text = read(document);
    let links = links(document).into_iter().map(|link| target(document, &link).0);
    let quoted = text.split('`').skip(1).step_by(2).filter(|path| path.ends_with(".rs"));
    links.chain(quoted.map(PathBuf::from)).collect()
}

#[test]
fn every_file_that_a_document_names_exists() {
    let named: Vec<_> = documents()
        .into_iter()
        .flat_map(|document| paths(&document).into_iter().map(move |path| (document.clone(), path)))
        .collect();
    assert!(named.len() > 40, "only {} paths found", named.len());
    for (document, path) in named {
        assert!(root().join(&path).exists(), "{} of {}", path.display(), document.display());
    }
}

/// Names of the headings of a document in links, as GitHub makes them.
fn headings(document: &Path) -> BTreeSet<String> {
    let text = read(document);
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let name = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(name).collect()
}

#[test]
fn every_heading_that_a_document_links_to_exists() {
    let mut checked = 0;
    for document in documents() {
        for link in links(&document) {
            let (path, Some(heading)) = target(&document, &link) else { continue };
            let is_there = headings(&path).contains(&heading);
            assert!(is_there, "{link} of {}", document.display());
            checked += 1;
        }
    }
    assert!(checked > 30, "only {checked} links to headings found");
}

/// Every page for users is reached from the table of contents.
#[test]
fn the_contents_list_every_page() {
    let contents = read("docs/README.md");
    for document in documents().iter().filter(|path| path.parent() == Some(Path::new("docs"))) {
        let name = document.file_name().unwrap().to_str().unwrap();
        let is_there = name == "README.md" || contents.contains(&format!("]({name})"));
        assert!(is_there, "{name}: add a line to docs/README.md");
    }
}
