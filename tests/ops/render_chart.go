// render_chart renders a Helm chart as helm template does, with Go's template engine and sprig, for
// machines that have no helm. Reads a JSON request on stdin, writes {"path": "rendered text"}.
//
//	{"chart": DIR, "values": merged values, "release": {"Name", "Namespace"}, "kube_version": "v1.31.0"}
//
// Not helm's: hooks are rendered like the rest, lookup finds nothing (as in helm template), no
// subcharts, .Capabilities has KubeVersion only.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"github.com/gobwas/glob"
	"sigs.k8s.io/yaml"
)

type request struct {
	Chart       string                 `json:"chart"`
	Values      map[string]interface{} `json:"values"`
	Release     map[string]interface{} `json:"release"`
	KubeVersion string                 `json:"kube_version"`
}

// files is .Files: what the chart folder holds outside templates/.
type files map[string][]byte

func (f files) Get(name string) string { return string(f[name]) }

func (f files) Glob(pattern string) files {
	matcher := glob.MustCompile(pattern, '/')
	found := files{}
	for name, content := range f {
		if matcher.Match(name) {
			found[name] = content
		}
	}
	return found
}

func readTree(root string) (files, error) {
	tree := files{}
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		tree[filepath.ToSlash(name)], err = os.ReadFile(path)
		return err
	})
	return tree, err
}

func toYAML(value interface{}) string {
	text, err := yaml.Marshal(value)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(text), "\n")
}

func fromYAML(text string) map[string]interface{} {
	value := map[string]interface{}{}
	if err := yaml.Unmarshal([]byte(text), &value); err != nil {
		value["Error"] = err.Error()
	}
	return value
}

// functions are sprig's without those that read the environment, and helm's own.
func functions(root *template.Template) template.FuncMap {
	all := sprig.TxtFuncMap()
	delete(all, "env")
	delete(all, "expandenv")
	depth := map[string]int{}
	all["include"] = func(name string, data interface{}) (string, error) {
		if depth[name]++; depth[name] > 100 {
			return "", fmt.Errorf("include %q nests too deeply", name)
		}
		defer func() { depth[name]-- }()
		var out bytes.Buffer
		err := root.ExecuteTemplate(&out, name, data)
		return out.String(), err
	}
	all["tpl"] = func(text string, data interface{}) (string, error) {
		clone, err := root.Clone()
		if err != nil {
			return "", err
		}
		parsed, err := clone.New("tpl").Parse(text)
		if err != nil {
			return "", err
		}
		var out bytes.Buffer
		err = parsed.Execute(&out, data)
		return strings.ReplaceAll(out.String(), "<no value>", ""), err
	}
	all["required"] = func(message string, value interface{}) (interface{}, error) {
		if text, isText := value.(string); value == nil || (isText && text == "") {
			return nil, errors.New(message)
		}
		return value, nil
	}
	all["fail"] = func(message string) (string, error) { return "", errors.New(message) }
	all["lookup"] = func(string, string, string, string) map[string]interface{} {
		return map[string]interface{}{}
	}
	all["toYaml"] = toYAML
	all["fromYaml"] = fromYAML
	return all
}

func render(r request) (map[string]string, error) {
	tree, err := readTree(r.Chart)
	if err != nil {
		return nil, err
	}
	chart := map[string]interface{}{}
	if err := yaml.Unmarshal(tree["Chart.yaml"], &chart); err != nil {
		return nil, err
	}
	fields := map[string]interface{}{} // .Chart has Go's names: Name, AppVersion
	for key, value := range chart {
		fields[strings.ToUpper(key[:1])+key[1:]] = value
	}
	r.Release["Service"] = "Helm"
	root := template.New("chart").Option("missingkey=zero")
	root.Funcs(functions(root))
	outside := files{}
	for name, content := range tree {
		if !strings.HasPrefix(name, "templates/") {
			outside[name] = content
		} else if _, err := root.New(name).Parse(string(content)); err != nil {
			return nil, err
		}
	}
	rendered := map[string]string{}
	for name := range tree {
		if !strings.HasPrefix(name, "templates/") || strings.HasPrefix(filepath.Base(name), "_") {
			continue
		}
		var out bytes.Buffer
		err := root.ExecuteTemplate(&out, name, map[string]interface{}{
			"Values": r.Values, "Chart": fields, "Release": r.Release, "Files": outside,
			"Capabilities": map[string]interface{}{
				"KubeVersion": map[string]interface{}{"Version": r.KubeVersion}},
			"Template": map[string]interface{}{"Name": name, "BasePath": "templates"},
		})
		if err != nil {
			return nil, err
		}
		rendered[name] = strings.ReplaceAll(out.String(), "<no value>", "")
	}
	return rendered, nil
}

func main() {
	var r request
	err := json.NewDecoder(os.Stdin).Decode(&r)
	if err == nil {
		var rendered map[string]string
		if rendered, err = render(r); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(rendered)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
